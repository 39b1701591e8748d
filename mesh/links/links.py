"""Links: long-lived, multiplexed streams between this node and its peers.

A node opens one link to each peer that it calls and keeps it; the calls and one-way frames of all
requests share it, and replies return on it. Every frame carries the sender's load. When a link
breaks, every call that waits on it fails with `PeerLost` at once, and `on_lost` is called: failover
starts from there, not from a timer. Nothing is retried here: retries have one place and one budget, in routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import structlog
import trio

from mesh.errors import BadRequest, DeadlineExceeded, LocalError, MeshError
from mesh.ids import Address, NodeId, format_address
from mesh.links.call_errors import error_to_header
from mesh.links.link import HANDSHAKE_TIMEOUT_S, PROTOCOL_VERSION, Link, LinkConfig, LinkStatistics
from mesh.links.refusals import WINDOW_S, Refusals
from mesh.links.tls import why_impostor
from mesh.view import Load
from mesh.wire.calls import CallReply, Handler, Handlers, Header, Receiver, Receivers
from mesh.wire.frame_stream import CLOSED, COALESCE_BYTES, FrameSource, send
from mesh.wire.frames import Frame, encode

CALLS_AT_ONCE = 512  # handlers running for one inbound link; at this number reading stops, and TCP slows the peer down

OTHER_KEY = "it has another mesh key, or one that was rotated away"

log = structlog.get_logger()


OnLost = Callable[[NodeId | None, Address | None, str], None]
"""Called for every link that ended, with the peer's id (None where the handshake failed), its address (None for an inbound link)
and the reason. A link of `Links.keep` that was never opened is not reported."""


class Links:
    """All links of one node. `handlers` answer calls, `receivers` take one-way frames; both may be added to until `run`."""

    def __init__(
        self,
        config: LinkConfig,
        *,
        load: Callable[[], Load] = Load,
        on_load: Callable[[NodeId, Load], None] = lambda node, load: None,
        on_lost: OnLost = lambda node, address, reason: None,
        on_linked: Callable[[NodeId], None] = lambda node: None,
    ) -> None:
        """`on_linked`: called for every link, inbound or outgoing, whose handshake succeeded; `on_lost` follows once for each."""
        self.config = config
        self.handlers: dict[str, Handler] = {}
        self.receivers: dict[str, Receiver] = {}
        self.load = load
        self.on_load = on_load
        self.on_lost = on_lost
        self.on_linked = on_linked
        self.counters = LinkStatistics()
        self._nursery: trio.Nursery | None = None
        self._links: dict[Address, Link] = {}
        self.refusals = Refusals()

    def statistics(self) -> LinkStatistics:
        return replace(self.counters)

    def add(self, handlers: Handlers | None = None, receivers: Receivers | None = None) -> None:
        """Registers handlers of calls and receivers of one-way frames. Raises LocalError when a kind is already registered."""
        for kind in (*(handlers or {}), *(receivers or {})):
            if kind in self.handlers or kind in self.receivers:
                raise LocalError(f"frame kind {kind!r} is registered twice")
        self.handlers |= handlers or {}
        self.receivers |= receivers or {}

    async def run(self, listener: trio.SocketListener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves peers on `listener` and owns all outgoing links, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.serve_listeners(self._serve_peer, [listener], handler_nursery=nursery)

    async def call(self, to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0) -> CallReply:
        """See `mesh.wire.calls.Call`."""
        if to == self.config.address:
            return await self.handlers[kind](self.config.me, header, tail)
        with trio.move_on_after(timeout_s) as scope:
            return await self._link_to(to).call(kind, header, tail)
        assert scope.cancelled_caught
        raise DeadlineExceeded(f"{kind} to {format_address(to)} had no answer within {timeout_s:g} s")

    def post(self, to: Address, kind: str, header: Header, tail: bytes = b"") -> None:
        """See `mesh.wire.calls.Post`."""
        if to == self.config.address:
            self.receivers[kind](self.config.me, header, tail)
        else:
            self._link_to(to).enqueue(Frame(kind, header, tail))

    def keep(self, addresses: Iterable[Address]) -> None:
        """Opens links to the addresses that have none. An idle link is never closed: its end is evidence of the peer's end."""
        for address in addresses:
            if address != self.config.address and self._nursery is not None:
                self._link_to(address)

    def _link_to(self, to: Address) -> Link:
        link = self._links.get(to)
        if link is None:
            if self._nursery is None:
                raise LocalError("Links.run must be running before a call")
            link = self._links[to] = Link(to, self.config, self.counters, self.load, self.on_load, self.on_linked)
            self._nursery.start_soon(self._keep_link, link)
        return link

    async def _keep_link(self, link: Link) -> None:
        """Runs one outgoing link from its opening to its loss, and reports the loss."""
        reason = await link.run()
        if self._links.get(link.to) is link:
            del self._links[link.to]
        link.fail(reason)
        self.counters.links_lost_total += 1
        if link.refused:
            self._note_refusal(link.to[0], reason)
        if link.used or link.peer is not None:
            self.on_lost(link.peer, link.to, reason)

    async def _serve_peer(self, stream: trio.SocketStream) -> None:
        """Runs one inbound link: the handshake, then answers to calls until the link ends."""
        connection: trio.abc.Stream = stream
        if self.config.tls is not None:
            connection = trio.SSLStream(stream, self.config.tls.server, server_side=True)
        frames = FrameSource(connection)
        peer: NodeId | None = None
        host = _host_of(stream)
        try:
            with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
                peer = await self._greet_caller(connection, frames)
            if peer is None:
                self.counters.handshakes_refused_total += 1
            else:
                self.on_linked(peer)
                await self._answer(peer, connection, frames)
        finally:
            self.counters.frames_rejected_total += frames.broke_the_protocol
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(connection)
        if peer is not None:
            self.on_lost(peer, None, frames.end_reason)
        elif self.config.tls is not None and self.config.tls.asked_for_another_key(connection):
            self._note_refusal(host, OTHER_KEY)
        elif frames.end_reason != CLOSED:  # a connect check connects and closes, which is no error
            self._note_refusal(host, frames.end_reason or "the handshake was not finished in time")

    async def _greet_caller(self, connection: trio.abc.Stream, frames: FrameSource) -> NodeId | None:
        hello = await frames.next()
        if hello is None:
            return None
        refusal = self._why_refuse(hello)
        node = hello.header.get("node")
        if refusal is None:
            assert isinstance(node, str), "a hello without a node id is refused above"
            if self.config.tls is not None:
                assert isinstance(connection, trio.SSLStream)
                refusal = why_impostor(connection, node)
        answer: Header = {"node": self.config.me, "refused": refusal}
        if not await send(connection, encode(Frame("hello", answer, is_reply=True))):
            return None
        if refusal is None:
            frames.greeted()
            return NodeId(str(node))
        frames.end_reason = refusal
        return None

    def _note_refusal(self, host: str, reason: str) -> None:
        if self.refusals.note(host, reason[:200], trio.current_time()):
            log.warning("link.refused", host=host, reason=reason, next_in_s=WINDOW_S)

    def _why_refuse(self, hello: Frame) -> str | None:
        header = hello.header
        if hello.kind != "hello" or not isinstance(header.get("node"), str):
            return "expected a hello frame with a node id"
        if header.get("version") != PROTOCOL_VERSION:
            theirs = repr(header.get("version"))[:100]
            return f"protocol version {theirs}, here {PROTOCOL_VERSION}: run the same release on both nodes"
        if header.get("cluster") != self.config.cluster:
            theirs = repr(header.get("cluster"))[:100]
            return f"cluster label {theirs}, here {self.config.cluster!r}: these are two meshes"
        return None

    async def _answer(self, peer: NodeId, connection: trio.abc.Stream, frames: FrameSource) -> None:
        replies_in, replies = trio.open_memory_channel[bytes](CALLS_AT_ONCE)
        slots = trio.Semaphore(CALLS_AT_ONCE)
        async with trio.open_nursery() as link_nursery:
            link_nursery.start_soon(self._write_replies, connection, replies, link_nursery.cancel_scope)
            while (frame := await frames.next()) is not None:
                self.counters.frames_received_total += 1
                self.counters.bytes_received_total += len(frame.tail)
                self._note_load(peer, frame)
                if frame.number == 0:
                    self._receive(peer, frame)
                else:
                    await slots.acquire()
                    link_nursery.start_soon(self._answer_call, peer, frame, replies_in, slots)
            link_nursery.cancel_scope.cancel()

    def _note_load(self, peer: NodeId, frame: Frame) -> None:
        if frame.load is not None:
            self.on_load(peer, frame.load)

    def _receive(self, peer: NodeId, frame: Frame) -> None:
        receiver = self.receivers.get(frame.kind)
        if receiver is None:
            self.counters.frames_rejected_total += 1
            return
        try:
            receiver(peer, frame.header, frame.tail)
        except Exception as error:  # noqa: BLE001  # supervised: one peer frame; a malformed one must not end the node
            self.counters.frames_rejected_total += 1
            log.warning("link.frame_rejected", kind=frame.kind[:100], peer=peer, error=f"{type(error).__name__}: {error}"[:300])

    async def _answer_call(
        self, peer: NodeId, frame: Frame, replies: trio.MemorySendChannel[bytes], slots: trio.Semaphore
    ) -> None:
        """Answers a call. Its slot is free when the reply is in the channel: a peer that reads no replies gets no more calls."""
        try:
            await replies.send(await self._reply_to(peer, frame))
        finally:
            slots.release()

    async def _reply_to(self, peer: NodeId, frame: Frame) -> bytes:
        try:
            handler = self.handlers.get(frame.kind)
            if handler is None:
                raise BadRequest(f"this node answers no {frame.kind[:100]!r} call; are both nodes of one release?")
            header, tail = await handler(peer, frame.header, frame.tail)
            return self._encode_reply(frame, header, tail)
        except Exception as error:  # supervised: one peer call
            if not isinstance(error, MeshError):
                self.counters.handler_failures_total += 1
                log.error("call.failed", kind=frame.kind[:100], peer=peer, exc_info=error)
            return self._encode_reply(frame, {"error": error_to_header(error)})

    def _encode_reply(self, call: Frame, header: Header, tail: bytes = b"") -> bytes:
        return encode(Frame(call.kind, header, tail, call.number, is_reply=True, load=self.load()))

    async def _write_replies(
        self, connection: trio.abc.Stream, replies: trio.MemoryReceiveChannel[bytes], link_scope: trio.CancelScope
    ) -> None:
        async for data in replies:
            batch = _drain(replies, data)
            self.counters.frames_sent_total += len(batch)
            self.counters.bytes_sent_total += sum(map(len, batch))
            if not await send(connection, b"".join(batch)):
                link_scope.cancel()
                return


def _host_of(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:  # the peer has closed the connection
        return "unknown"


def _drain(channel: trio.MemoryReceiveChannel[bytes], first: bytes) -> list[bytes]:
    batch, size = [first], len(first)
    while size < COALESCE_BYTES:
        try:
            batch.append(channel.receive_nowait())
        except trio.WouldBlock:
            break
        size += len(batch[-1])
    return batch
