"""One HTTP/1.1 connection and its requests: h11 parses, the ASGI application answers, this file enforces time and size limits.

Framing errors of the client are answered in the contract's error form where an answer can still be sent, and end the connection.
Nothing here is shielded: cancelling the connection's task ends it at once, even while the client does not read, and the
application's cleanup runs inside that task. ASGI's `receive` enforces the body's limits and reports the disconnect once the body
is in; `send` frames the answer and removes the body of an answer to HEAD. One task may read while another one writes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

import h11
import trio

from mesh.errors import BadRequest, LocalError, Refused
from node.http.errors import ClientGone, ErrorAnswer, answer_of
from node.http.limits import Limits

AsgiMessage = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]  # of ASGI: a request's head
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

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

    async def receive(self) -> AsgiMessage:
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

    async def _body_part(self) -> AsgiMessage:
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

    async def send(self, message: AsgiMessage) -> None:
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
            return False  # given up before the end: the missing terminating chunk shows it to the client
        if self._wire.their_state in (h11.SEND_BODY, h11.ERROR) and not await self._skip_body():
            await self._linger()
            return False
        if self.last or self._wire.our_state is not h11.DONE or self._wire.their_state is not h11.DONE:
            if self._wire.trailing_data[0]:
                await self._linger()
            return False
        return True

    async def _next_request(self) -> h11.Request | None:
        """Returns the next head; None when the client closed, or sent nothing in time.

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

    def _scope(self, request: h11.Request) -> Scope:
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
    """The bytes of a whole answer that ends its connection; `wire` is informed, where there was enough of a request for one."""
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


def _address(stream: object, end: str) -> tuple[str, int] | None:
    """Host and port of one end of a TCP stream; None for any other stream."""
    if not isinstance(stream, trio.SocketStream):
        return None
    try:
        host, port = getattr(stream.socket, end)()[:2]
    except (OSError, ValueError):
        return None
    return str(host), int(port)
