"""One outgoing link: opened once, shared by all calls and one-way frames to a peer; when it ends, all of them fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from mesh.errors import PeerLost, PeerRefused
from mesh.ids import Address, NodeId, format_address
from mesh.links.call_errors import error_from_header
from mesh.links.tls import PeerTls, why_impostor
from mesh.view import Load
from mesh.wire.calls import CallReply, Header
from mesh.wire.frame_stream import COALESCE_BYTES, FrameSource, send
from mesh.wire.frames import Frame, encode

PROTOCOL_VERSION = 2
HANDSHAKE_TIMEOUT_S = 2.0  # shorter than any call's timeout, so that the caller gets the reason of the failure
CONNECT_TIMEOUT_S = 3.0
OUTBOX_FRAMES = 4096  # some seconds of tokens for 1,000 sequences; with more unread frames the peer counts as lost
OUTBOX_BYTES = 256 << 20


@dataclass(slots=True)
class LinkStatistics:
    """Counters since the start."""

    frames_sent_total: int = 0
    frames_received_total: int = 0
    bytes_sent_total: int = 0
    bytes_received_total: int = 0
    links_opened_total: int = 0
    links_lost_total: int = 0
    handshakes_refused_total: int = 0
    frames_rejected_total: int = 0
    handler_failures_total: int = 0


@dataclass(frozen=True, slots=True)
class LinkConfig:
    me: NodeId
    address: Address
    cluster: str = "mesh"
    tls: PeerTls | None = None


class Link:
    """One outgoing link. Frames wait in the outbox until it is open."""

    def __init__(
        self,
        to: Address,
        config: LinkConfig,
        counters: LinkStatistics,
        load: Callable[[], Load],
        on_load: Callable[[NodeId, Load], None],
        on_linked: Callable[[NodeId], None],
    ) -> None:
        self.to = to
        self.peer: NodeId | None = None
        self.used = False  # a frame was sent over it, or waits to be sent
        self._config = config
        self._counters = counters
        self._load = load
        self._on_load = on_load
        self._on_linked = on_linked
        self._inbox, self._outbox = trio.open_memory_channel[Frame](OUTBOX_FRAMES)
        self._outbox_bytes = 0
        self._calls: dict[int, PendingCall] = {}
        self._last_number = 0
        self._failed: str | None = None
        self.refused = False

    async def call(self, kind: str, header: Header, tail: bytes) -> CallReply:
        """Sends a call and waits for its reply.

        Raises:
            PeerLost: the link ended first, or its outbox is full.
            MeshError: the error that the peer answered with.
        """
        self._last_number += 1
        number = self._last_number
        pending = self._calls[number] = PendingCall()
        try:
            self.enqueue(Frame(kind, header, tail, number))
            await pending.answered.wait()
        finally:
            self._calls.pop(number, None)
        if pending.reply is None:
            raise self._lost(pending.failure)
        error = pending.reply.header.get("error")
        if error is not None:
            raise error_from_header(self.peer or format_address(self.to), error)
        return pending.reply.header, pending.reply.tail

    def enqueue(self, frame: Frame) -> None:
        """Puts a frame into the outbox. Raises PeerLost: the link has ended, or the outbox is full."""
        self.used = True
        if self._failed is not None:
            raise self._lost(self._failed)
        if self._outbox_bytes + len(frame.tail) > OUTBOX_BYTES:
            raise PeerLost(format_address(self.to), f"{self._outbox_bytes} bytes wait unread: the peer does not read")
        try:
            self._inbox.send_nowait(frame)
        except trio.WouldBlock:
            raise PeerLost(format_address(self.to), f"{OUTBOX_FRAMES} frames wait unread: the peer does not read") from None
        self._outbox_bytes += len(frame.tail)

    def _lost(self, reason: str) -> PeerLost:
        return (PeerRefused if self.refused else PeerLost)(format_address(self.to), reason)

    def fail(self, reason: str) -> None:
        """Ends the link: every call that waits on it, and every later use of it, raises PeerLost."""
        self._failed = reason
        for pending in self._calls.values():
            pending.failure = reason
            pending.answered.set()

    async def run(self) -> str:
        """Opens the link, sends the outbox and receives replies until the link ends. Returns why it ended."""
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                stream = await trio.open_tcp_stream(*self.to)
        except (
            OSError,
            ValueError,
            OverflowError,
            trio.TooSlowError,
        ) as error:  # a peer's address may be invalid
            return "connection refused: no node listens there" if _is_refusal(error) else f"cannot connect: {error or 'timeout'}"
        connection: trio.abc.Stream = stream
        if (tls := self._config.tls) is not None:
            connection = trio.SSLStream(stream, tls.client, server_hostname=tls.server_name)
        frames = FrameSource(connection)
        try:
            refusal: str | None = "no answer to the handshake: not a mesh node, or a wedged one"
            with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
                refusal = await self._greet(connection, frames)
            if refusal is not None:
                self.refused = True
                return refusal
            self._counters.links_opened_total += 1
            async with trio.open_nursery() as link_nursery:
                link_nursery.start_soon(self._write, connection, link_nursery.cancel_scope)
                while (frame := await frames.next()) is not None:
                    self._on_reply(frame)
                link_nursery.cancel_scope.cancel()
            return frames.end_reason
        finally:
            self._counters.frames_rejected_total += frames.broke_the_protocol
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(connection)

    async def _greet(self, connection: trio.abc.Stream, frames: FrameSource) -> str | None:
        """Exchanges hello frames. Returns why the handshake failed; None where it succeeded."""
        config = self._config
        hello: Header = {"version": PROTOCOL_VERSION, "cluster": config.cluster, "node": config.me}
        if not await send(connection, encode(Frame("hello", hello))):
            return _why_greeting_ended(frames, tls=config.tls is not None)
        answer = await frames.next()
        if answer is None:
            return _why_greeting_ended(frames, tls=config.tls is not None)
        if answer.header.get("refused"):
            return f"refused: {str(answer.header['refused'])[:300]}"
        node = answer.header.get("node")
        if answer.kind != "hello" or not isinstance(node, str):
            return "not a mesh node: its answer to the handshake is not ours"
        if config.tls is not None:
            assert isinstance(connection, trio.SSLStream)
            if impostor := why_impostor(connection, node):
                return impostor
        frames.greeted()
        self.peer = NodeId(node)
        self._on_linked(self.peer)
        return None

    async def _write(self, connection: trio.abc.Stream, link_scope: trio.CancelScope) -> None:
        counters = self._counters
        async for first in self._outbox:
            batch, size = [], 0
            frame: Frame | None = first
            load = self._load()
            while frame is not None:
                self._outbox_bytes -= len(frame.tail)
                assert self._outbox_bytes >= 0
                data = encode(Frame(frame.kind, frame.header, frame.tail, frame.number, load=load))
                batch.append(data)
                size += len(data)
                try:
                    frame = self._outbox.receive_nowait() if size < COALESCE_BYTES else None
                except trio.WouldBlock:
                    frame = None
            if not await send(connection, b"".join(batch)):
                link_scope.cancel()
                return
            counters.frames_sent_total += len(batch)
            counters.bytes_sent_total += size

    def _on_reply(self, frame: Frame) -> None:
        counters = self._counters
        counters.frames_received_total += 1
        counters.bytes_received_total += len(frame.tail)
        if frame.load is not None and self.peer is not None:
            self._on_load(self.peer, frame.load)
        pending = self._calls.get(frame.number)
        if pending is None or not frame.is_reply:
            counters.frames_rejected_total += 1  # the caller's deadline has passed: a late reply changes nothing
            return
        pending.reply = frame
        pending.answered.set()


class PendingCall:
    """A call that waits for its reply: `answered` is set with either `reply` or `failure`."""

    __slots__ = ("answered", "failure", "reply")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.reply: Frame | None = None
        self.failure = ""


def _is_refusal(error: BaseException) -> bool:
    causes = [error, error.__cause__]
    return any(
        isinstance(cause, ConnectionRefusedError)
        or (isinstance(cause, BaseExceptionGroup) and any(isinstance(e, ConnectionRefusedError) for e in cause.exceptions))
        for cause in causes
    )


def _why_greeting_ended(frames: FrameSource, *, tls: bool) -> str:
    if frames.broke_the_protocol:
        return frames.end_reason
    if tls:
        return "TLS handshake failed: the peer has another mesh key or none, or is not a mesh node"
    return "closed during the handshake: it wants a mesh key, or is not a mesh node"
