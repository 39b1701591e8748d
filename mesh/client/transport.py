"""Carries out the effects of `mesh.client.flow` with httpx: with blocking calls, and under trio."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from mesh.client.flow import ConnectionFailed, FlowEffect, FlowOutcome, HttpResponse, ReadBody, SendRequest, Sleep
from mesh.errors import LocalError

if TYPE_CHECKING:
    import httpx

CONNECT_S = 5.0

T = TypeVar("T")


def connection_limits() -> httpx.Limits:
    """Returns limits for a load test: any number of connections. Idle connections are closed before a node closes them."""
    import httpx

    return httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=4.0)


def proxied(kind: Callable[..., T], proxy: str | None, **options: object) -> T:
    """Returns an HTTP client that uses `proxy`, or none where it is None; proxies of the environment are ignored.

    Raises:
        LocalError: the kind of proxy is unknown or needs another package.
    """
    try:
        return kind(trust_env=False, **({"proxy": proxy} if proxy else {}), **options)
    except ImportError:
        raise LocalError(f"the proxy {proxy!r} needs a package; install it with: pip install 'httpx[socks]'") from None
    except ValueError as error:
        raise LocalError(f"expected the URL of a proxy such as http://127.0.0.1:3128, got {proxy!r}: {error}") from None


def request_of(http: httpx.Client | httpx.AsyncClient, effect: SendRequest) -> httpx.Request:
    import httpx

    timeout = httpx.Timeout(effect.silence_s, connect=min(CONNECT_S, effect.silence_s), pool=None)
    content = effect.body if effect.body or effect.method == "POST" else None
    return http.build_request(effect.method, effect.node + effect.path, content=content, headers=effect.headers, timeout=timeout)


def reason_of(error: Exception) -> str:
    """Returns why a request failed, for an error message."""
    import httpx

    match error:
        case httpx.ConnectTimeout():
            return f"no connection within {CONNECT_S:.0f} s"
        case httpx.ConnectError():
            return "connection refused" if _refused(error) else f"cannot connect ({error})"
        case httpx.TimeoutException():
            return "no answer in time"
        case httpx.RemoteProtocolError() | httpx.ReadError():
            return "the connection broke off"
    return str(error) or type(error).__name__


def _refused(error: BaseException | None) -> bool:
    """Returns whether the error is "connection refused", or was raised because of it at any depth."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__
    return error is not None


class BlockingIo:
    """Carries out effects with blocking calls; at most one answer is open at a time."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._open: httpx.Response | None = None
        self._received: Iterator[bytes] = iter(())  # the body of the open answer

    def carry_out(self, effect: FlowEffect) -> FlowOutcome:
        import httpx

        try:
            match effect:
                case SendRequest():
                    return self._send(effect)
                case ReadBody():
                    return next(self._received, b"")
                case Sleep():
                    time.sleep(effect.seconds)
                    return None
        except httpx.TransportError as error:
            return ConnectionFailed(reason_of(error))
        except httpx.InvalidURL as error:
            return ConnectionFailed(f"not a usable address ({error})")
        raise LocalError(f"not an effect of a client: {effect!r}")

    def _send(self, effect: SendRequest) -> HttpResponse:
        self.close()
        response = self._http.send(request_of(self._http, effect), stream=True)
        self._open = response
        if effect.streaming and response.status_code < 300:
            self._received = response.iter_bytes()
            return HttpResponse(effect.node, response.status_code, response.headers)
        body = response.read()
        self.close()
        return HttpResponse(effect.node, response.status_code, response.headers, body)

    def close(self) -> None:
        """Closes the connection of the open answer, if there is one."""
        if self._open is not None:
            self._open.close()
            self._open = None


class TrioIo:
    """`BlockingIo` under trio."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._open: httpx.Response | None = None
        self._received: AsyncIterator[bytes] | None = None  # the body of the open answer

    async def carry_out(self, effect: FlowEffect) -> FlowOutcome:
        import httpx
        import trio

        try:
            match effect:
                case SendRequest():
                    return await self._send(effect)
                case ReadBody():
                    assert self._received is not None, "ReadBody follows a streaming answer"
                    return await anext(self._received, b"")
                case Sleep():
                    await trio.sleep(effect.seconds)
                    return None
        except httpx.TransportError as error:
            return ConnectionFailed(reason_of(error))
        except httpx.InvalidURL as error:
            return ConnectionFailed(f"not a usable address ({error})")
        raise LocalError(f"not an effect of a client: {effect!r}")

    async def _send(self, effect: SendRequest) -> HttpResponse:
        await self.aclose()
        response = await self._http.send(request_of(self._http, effect), stream=True)
        self._open = response
        if effect.streaming and response.status_code < 300:
            self._received = response.aiter_bytes()
            return HttpResponse(effect.node, response.status_code, response.headers)
        body = await response.aread()
        await self.aclose()
        return HttpResponse(effect.node, response.status_code, response.headers, body)

    async def aclose(self) -> None:
        """Closes the connection of the open answer, if there is one."""
        import httpx

        if self._open is not None:
            received, response, self._received, self._open = self._received, self._open, None, None
            await response.aclose()
            if received is not None:
                # httpx nests generators and closes only the outermost: reading from the closed connection ends the others too.
                try:
                    async for _ in received:
                        pass
                except (httpx.HTTPError, httpx.StreamError):
                    pass
