"""One request and its answer, as ASGI's `receive` and `send` over h11.

`receive` enforces the body's limits and turns into the disconnect watch once the body is in; `send` frames
the answer and hides what HEAD must not carry. Both may run in two tasks at once: one reads, one writes.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import h11
import trio

from mesh.errors import BadRequest, LocalError, Refused
from node.http.errors import ClientGone
from node.http.limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

READ_BYTES = 16 << 10  # below the head limit, so that h11 sees an oversized head before it is whole
DISCONNECT = "http.disconnect"


@dataclass(slots=True)
class ServerCounts:
    """What happens on all connections of a server; the server publishes a frozen copy."""

    requests: int = 0
    framing_errors: int = 0
    stalled_readers: int = 0
    hung_up: int = 0
    bodies_bytes: int = 0  # held right now


class HttpExchange:
    """The seam between one h11 cycle and the application.

    A write that did not finish (hung up, stalled, cancelled) leaves the framing broken: from then on every
    `send` raises ClientGone, so nothing can follow a torn chunk.
    """

    def __init__(
        self,
        wire: h11.Connection,
        request: h11.Request,
        stream: trio.abc.Stream,
        write: Callable[[bytes], Awaitable[None]],
        limits: Limits,
        counts: ServerCounts,
        closing: Callable[[], bool],
    ) -> None:
        self._wire = wire
        self._stream = stream
        self._write = write
        self._limits = limits
        self._counts = counts
        self._closing = closing
        self._head_only = request.method == b"HEAD"
        self._announced_bytes = _content_length(request)
        self._body_deadline = trio.current_time() + limits.body_s
        self._body_bytes = 0
        self._body_done = False
        self._broken = False
        self._answered = trio.Event()
        self._head: bytes | None = None  # framed, waiting to go out with the first part of the body

    async def receive(self) -> Message:
        """The next part of the body; after its end, waits until the client hangs up or the answer is complete.

        Raises:
            BadRequest: 413 for a body too large, 408 for one too slow, 400 for broken chunks; nothing more can be read.
            Refused: the bodies of all requests together are too large.
        """
        if self._broken or self._answered.is_set():
            return {"type": DISCONNECT}
        if self._body_done:
            await self._until_gone()
            return {"type": DISCONNECT}
        return await self._body_part()

    def release(self) -> None:
        """The application is done with the body."""
        self._counts.bodies_bytes -= self._body_bytes
        self._body_bytes = 0

    async def _body_part(self) -> Message:
        limit = self._limits.body_bytes
        if self._announced_bytes > limit:
            raise BadRequest(f"expected a body of at most {limit} bytes, got {self._announced_bytes}", status=413)
        with trio.move_on_at(self._body_deadline):
            if self._wire.they_are_waiting_for_100_continue:
                await self._write(self._wire.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            while True:
                try:
                    event = self._wire.next_event()
                except h11.RemoteProtocolError as error:
                    raise framing_error(error) from error
                if event is h11.NEED_DATA:
                    received = await self._read()
                    if not received:
                        return {"type": DISCONNECT}
                    self._wire.receive_data(received)
                elif isinstance(event, h11.Data):
                    self._body_bytes += len(event.data)
                    self._counts.bodies_bytes += len(event.data)
                    if self._body_bytes > limit:
                        raise BadRequest(f"expected a body of at most {limit} bytes, got more", status=413)
                    if self._counts.bodies_bytes > self._limits.bodies_bytes:
                        raise Refused("this node holds too many request bodies already", 1.0)
                    return {"type": "http.request", "body": bytes(event.data), "more_body": True}
                else:
                    self._body_done = True
                    return {"type": "http.request", "body": b"", "more_body": False}
        raise BadRequest(f"expected the whole body within {self._limits.body_s:g} s", status=408)

    async def _read(self) -> bytes:
        """Bytes from the client; empty, from then on for good, when it hung up."""
        try:
            received = bytes(await self._stream.receive_some(READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            received = b""
        if not received:
            self._broken = True
        return received

    async def _until_gone(self) -> None:
        """Returns when the client hung up or the answer is complete. Pipelined bytes are kept, up to a limit."""
        ahead_bytes = len(self._wire.trailing_data[0])
        while ahead_bytes < self._limits.pipelined_bytes:
            received = await self._read()
            if not received:
                return
            self._wire.receive_data(received)
            ahead_bytes += len(received)
        await self._answered.wait()

    async def send(self, message: Message) -> None:
        """Frames and writes one ASGI message.

        Raises:
            ClientGone: the answer cannot be completed any more.
        """
        if self._broken:
            raise ClientGone("the client hung up")
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), date_header()]
            if self._closing():
                headers.append((b"connection", b"close"))
            status = message["status"]
            self._head = self._frame(h11.Response(status_code=status, headers=headers, reason=reason_phrase(status)))
            return
        if message["type"] != "http.response.body":
            raise LocalError(f"expected http.response.start or .body, got {message['type']}")
        framed, self._head = self._head or b"", None
        body = message.get("body", b"")
        if body and not self._head_only:
            framed += self._frame(h11.Data(data=body))
        ended = not message.get("more_body", False)
        if ended:
            framed += self._frame(h11.EndOfMessage())
        self._broken = True  # until the write is through: it may be cancelled in the middle
        await self._write(framed)
        self._broken = False
        if ended:
            self._answered.set()

    def _frame(self, event: h11.Event) -> bytes:
        try:
            return self._wire.send(event) or b""
        except h11.LocalProtocolError:
            self._broken = True
            raise


def framing_error(error: h11.RemoteProtocolError) -> BadRequest:
    """h11's complaint about the client's bytes as one of ours."""
    if error.error_status_hint == 431:
        return BadRequest("expected a smaller request head", status=431)
    if error.error_status_hint == 501:
        return BadRequest("expected no transfer encoding but chunked", status=501)
    return BadRequest(f"expected a well-formed HTTP/1.1 request: {str(error)[:200]}", code="malformed_request")


def reason_phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


def date_header() -> tuple[bytes, bytes]:
    return b"date", _date(int(time.time()))


@lru_cache(maxsize=1)
def _date(unix_s: int) -> bytes:
    return formatdate(unix_s, usegmt=True).encode()


def _content_length(request: h11.Request) -> int:
    """As announced; 0 without an announcement. h11 has checked that it is a number."""
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)
