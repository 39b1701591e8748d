"""One HTTP/1.1 connection: h11 parses, the ASGI application answers, this decides about time and size.

Everything the client does wrong in framing is answered in the contract's error form where an answer can
still be sent, and ends the connection. Nothing here is shielded: cancelling the connection's task ends it
at once, even while the client does not read, and the application's cleanup runs inside that task.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

import h11
import trio

from mesh.errors import BadRequest, Refused
from node.http.errors import ClientGone, ErrorAnswer, answer_of
from node.http.exchange import READ_BYTES, App, HttpExchange, ServerCounts, date_header, framing_error, reason_phrase
from node.http.limits import Limits

WRITE_PIECE_BYTES = 256 << 10  # the write deadline holds for each piece, so a slow reader of a large file is not a stalled one


@dataclass(slots=True, eq=False)
class Connection:
    stream: trio.abc.Stream
    app: App
    limits: Limits
    counts: ServerCounts
    own_headers: tuple[tuple[bytes, bytes], ...] = ()
    last: bool = False  # close after the request at hand
    _wire: h11.Connection = field(init=False)
    _idle: trio.CancelScope | None = field(init=False, default=None)
    _answered: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._wire = h11.Connection(h11.SERVER, max_incomplete_event_size=self.limits.head_bytes)

    async def run(self) -> None:
        """Answers requests until either side is done. Returns with the socket closed."""
        try:
            while await self._answer_one():
                self._wire.start_next_cycle()
        except (ClientGone, trio.BrokenResourceError, trio.ClosedResourceError):
            self.counts.hung_up += 1
        finally:
            await trio.aclose_forcefully(self.stream)

    def finish_soon(self) -> None:
        """No further request: an idle connection closes now, a busy one after its answer."""
        self.last = True
        if self._idle is not None:
            self._idle.cancel()

    async def _answer_one(self) -> bool:
        """Whether the connection may carry another request."""
        try:
            request = await self._next_request()
            if request is None:
                return False
            self._refuse_bad_head(request)
        except h11.RemoteProtocolError as error:
            return await self._refuse(framing_error(error))
        except BadRequest as error:
            return await self._refuse(error)
        self.counts.requests += 1
        self._answered += 1
        exchange = HttpExchange(self._wire, request, self.stream, self.write, self.limits, self.counts, closing=lambda: self.last)
        try:
            await self.app(self._scope(request), exchange.receive, exchange.send)
        except BadRequest as error:  # from `receive`: an application may leave it to us
            if self._wire.our_state is not h11.SEND_RESPONSE:
                raise
            return await self._refuse(error)
        finally:
            exchange.release()
        return await self._settle()

    async def _settle(self) -> bool:
        """After the application returned: whether both sides are ready for another request."""
        if self._wire.our_state not in (h11.DONE, h11.MUST_CLOSE):
            return False  # given up before the end: the missing terminating chunk tells the client
        if self._wire.their_state in (h11.SEND_BODY, h11.ERROR) and not await self._skip_body():
            await self._linger()
            return False
        if self.last or self._wire.our_state is not h11.DONE or self._wire.their_state is not h11.DONE:
            if self._wire.trailing_data[0]:
                await self._linger()
            return False
        return True

    async def _next_request(self) -> h11.Request | None:
        """The next head; None when the client closed, or said nothing, in time.

        Raises:
            BadRequest: 408, a head began and did not end in time.
            h11.RemoteProtocolError: it is not HTTP/1.1.
        """
        began = bool(self._wire.trailing_data[0])  # pipelined
        wait_s = self.limits.keep_alive_s if self._answered and not began else self.limits.head_s
        with trio.move_on_after(wait_s) as scope:
            while True:
                event = self._wire.next_event()
                if isinstance(event, h11.Request):
                    return event
                if event is not h11.NEED_DATA:
                    return None
                if self.last and not began:
                    return None
                if not began:
                    self._idle = scope
                try:
                    received = await self.stream.receive_some(READ_BYTES)
                finally:
                    self._idle = None
                if received and not began:
                    began = True
                    scope.deadline = trio.current_time() + self.limits.head_s
                self._wire.receive_data(bytes(received))
        if began and not self.last:
            raise BadRequest(f"expected a whole request head within {self.limits.head_s:g} s", status=408)
        return None

    def _refuse_bad_head(self, request: h11.Request) -> None:
        """Raises BadRequest for a head that h11 takes and we do not."""
        size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
        if size > self.limits.head_bytes:
            raise BadRequest(f"expected a request head of at most {self.limits.head_bytes} bytes, got {size}", status=431)
        names = [name for name, _ in request.headers]
        if b"content-length" in names and b"transfer-encoding" in names:
            raise BadRequest("expected Content-Length or Transfer-Encoding, got both")  # the root of request smuggling
        for name, value in request.headers:
            if name == b"expect" and value.lower() != b"100-continue":
                raise BadRequest("expected no expectation but 100-continue", status=417)

    def _scope(self, request: h11.Request) -> dict[str, Any]:
        raw_path, _, query = origin_form(bytes(request.target)).partition(b"?")
        transport = getattr(self.stream, "transport_stream", None)
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": request.http_version.decode(),
            "method": request.method.decode(),
            "scheme": "http" if transport is None else "https",
            "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": _address(transport or self.stream, "getpeername"),
            "server": _address(transport or self.stream, "getsockname"),
        }

    async def write(self, data: bytes) -> None:
        """Sends all of `data`.

        Raises:
            ClientGone: the client hung up, or did not read a piece within the write deadline.
        """
        for start in range(0, len(data), WRITE_PIECE_BYTES):
            with trio.move_on_after(self.limits.write_s) as scope:
                try:
                    await self.stream.send_all(data[start : start + WRITE_PIECE_BYTES])
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise ClientGone("the client hung up") from error
            if scope.cancelled_caught:
                self.counts.stalled_readers += 1
                raise ClientGone(f"the client read nothing for {self.limits.write_s:g} s")

    async def _refuse(self, error: BadRequest | Refused) -> bool:
        """Answers what never reached the application, or could not be read by it; the connection ends."""
        self.counts.framing_errors += 1
        if self._wire.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self.write(refusal(answer_of(error), self.own_headers, self._wire))
            await self._linger()
        return False

    async def _skip_body(self) -> bool:
        """Throws away a body that the application did not read, if it is small and comes at once; True when it ended."""
        skipped = 0
        with trio.move_on_after(self.limits.linger_s):
            while skipped <= self.limits.unread_body_bytes:
                try:
                    event = self._wire.next_event()
                except h11.RemoteProtocolError:
                    return False
                if event is h11.NEED_DATA:
                    if self._wire.they_are_waiting_for_100_continue:
                        return False  # the final answer is out: whether the body follows is open
                    received = await self.stream.receive_some(READ_BYTES)
                    if not received:
                        return False
                    self._wire.receive_data(bytes(received))
                elif isinstance(event, h11.Data):
                    skipped += len(event.data)
                else:
                    return isinstance(event, h11.EndOfMessage)
        return False

    async def _linger(self) -> None:
        """Reads on for a moment: closing on unread bytes would reset the connection under the answer."""
        with trio.move_on_after(self.limits.linger_s):
            if isinstance(self.stream, trio.SocketStream):
                await self.stream.send_eof()
            while await self.stream.receive_some(READ_BYTES):
                pass


def refusal(answer: ErrorAnswer, own_headers: tuple[tuple[bytes, bytes], ...], wire: h11.Connection | None = None) -> bytes:
    """The bytes of a whole answer that ends its connection; `wire` is told, where there was enough of a request for one."""
    wire = wire or h11.Connection(h11.SERVER)
    body = answer.encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        (b"x-request-id", f"req_{secrets.token_hex(12)}".encode()),
        date_header(),
        *own_headers,
        *answer.headers,
    ]
    head = wire.send(h11.Response(status_code=answer.status, headers=headers, reason=reason_phrase(answer.status))) or b""
    if wire.our_state is not h11.SEND_BODY:
        return head
    try:
        return head + (wire.send(h11.Data(data=body)) or b"") + (wire.send(h11.EndOfMessage()) or b"")
    except h11.LocalProtocolError:  # the refused request was a HEAD: its answer has no body
        return head


def origin_form(target: bytes) -> bytes:
    """`/path?query` of a request target, which may also come as an absolute URL (RFC 9112, 3.2.2)."""
    if target.startswith(b"/"):
        return target
    _, scheme_end, rest = target.partition(b"://")
    if not scheme_end:
        return target  # `*` or `host:port`: no route has such a path
    slash = rest.find(b"/")
    return rest[slash:] if slash >= 0 else b"/"


def _address(stream: Any, end: str) -> tuple[str, int] | None:
    """Host and port of one end of a TCP stream; None for any other stream."""
    if not isinstance(stream, trio.SocketStream):
        return None
    try:
        host, port = getattr(stream.socket, end)()[:2]
    except (OSError, ValueError):
        return None
    return str(host), int(port)
