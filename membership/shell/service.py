"""The I/O of membership: a datagram socket, a clock and peer calls around one `MembershipCore`.

Makes no decisions. The core is called and its effects are carried out with no `await` in between, so no other task
sees a half-applied change.
All input that is ready is read before a timer may fire: a starved process must not take its own delay for others' silence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from types import MappingProxyType

import trio

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import (
    EpochRenewed,
    FactsChanged,
    LoadMeasured,
    LossBatch,
    MemberChanged,
    MemberForgotten,
    MembershipEffect,
    PingStream,
    PushFacts,
    SendDatagram,
    StartSync,
    TryConnect,
    ViewFrozen,
    WatchLinks,
)
from membership.shell.datagrams import Datagrams
from membership.shell.events import JoinFailed, MemberEvent, MembershipStatistics, statistics_of
from membership.shell.twin_calls import TwinCalls
from membership.trace.recording import RecordedCore
from membership.trace.trace_format import Trace
from mesh.errors import BadRequest, DeadlineExceeded, LocalError, PeerLost, PeerRefused, Refused, RemoteError
from mesh.ids import Address, NodeId, format_address
from mesh.keys.seal import Seal
from mesh.keys.signing import Signer
from mesh.links.connect_check import is_refused
from mesh.view import Facts, Load, Peer, View
from mesh.wire import gossip, sync
from mesh.wire.calls import Call, CallReply, Handlers, Header

EXCHANGE_TIMEOUT_S = 5.0
PUSH_TIMEOUT_S = 2.0
STREAM_PING_TIMEOUT_S = 1.0
FAREWELL_TIMEOUT_S = 1.0
RECALLED_AT_ONCE = 8
MAX_ROUNDS = 8  # calls of one exchange: what does not fit into one answer comes in the next
MAX_CALLS = 32  # exchanges and pushes under way; beyond it they are dropped: different fingerprints start them again

# Errors of a peer call that are no bug of this node.
_CALL_FAILED = (PeerLost, DeadlineExceeded, RemoteError, Refused, BadRequest)


class Membership:
    """Drives one membership core: sockets, timers and peer calls."""

    def __init__(
        self,
        me: NodeId,
        name: str,
        region: str,
        epoch: int,
        *,
        signer: Signer,
        socket: trio.socket.SocketType,
        address: Address,
        seal: Seal,
        call: Call,
        config: MembershipConfig | None = None,
        rng: Random | None = None,
        load: Callable[[], Load] = Load,
        knock: Callable[[Address], Awaitable[bool | None]] = is_refused,
        keep_links: Callable[[tuple[Address, ...]], None] = lambda addresses: None,
        trace_bytes: int = 0,
    ) -> None:
        """`socket`: bound, UDP; the caller closes it after `run` ended. `address`: where peers reach this node, by datagram and
        call. `epoch`: higher than that of any former run on the same data directory. `signer`: with the key from which `me` is
        derived. `knock`: returns whether the host at this address refuses connections. `keep_links`: is called with the
        addresses to keep links with; `linked` and `lost` report these links. `trace_bytes`: the size of the record of inputs, for
        `dump_trace`.

        Raises:
            ValueError: a name, host or region that fits no claim.
        """
        self.me = me
        self._call, self._load = call, load
        self._knock, self._keep_links = knock, keep_links
        self._address = address
        claim = gossip.Alive(me, epoch, 0, name, address[0], address[1], region)
        self._trace = Trace(trace_bytes) if trace_bytes else None
        made = claim, signer, config or MembershipConfig(), rng or Random(), trio.current_time()
        self._core = MembershipCore(*made) if self._trace is None else RecordedCore(*made, self._trace)
        self._peers: dict[NodeId, Peer] = {}
        self.view = View(me)
        self.twins = TwinCalls(me, signer, call, lambda: self.view, self._core, self._start_call, self._carry_out)
        self.handlers: Handlers = MappingProxyType({sync.SYNC_KIND: self._answer_sync, **self.twins.handlers})
        self.on_renewed: Callable[[int], None] = lambda epoch: None  # called with a higher epoch to store on disk
        self._subscribers: list[Callable[[MemberEvent], None]] = []
        self.on_loss_batch: Callable[[LossBatch], None] = lambda batch: None  # must not block or raise
        self._view_changed = trio.Event()
        self._deadline_moved = trio.Event()
        self._armed_for = -math.inf  # when `_keep_time` wakes by itself; only an earlier deadline has to wake it
        self._nursery: trio.Nursery | None = None
        self._datagrams = Datagrams(socket, seal)
        self.refusals, self.refused = self._datagrams.refusals, self._datagrams.refused
        self._calls = 0
        self._counts: Counter[str] = Counter()
        self._refresh([me])

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receives datagrams and keeps time until cancelled."""
        self._datagrams.open()
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._receive)
                task_status.started()
                await self._keep_time()
        finally:
            self._nursery = None
            self._datagrams.close()

    async def join(self, seeds: list[Address]) -> int:
        """Exchanges all records with every seed at once; returns how many answered. Seeds without a live member are retried.

        Raises:
            JoinFailed: there were seeds, and none answered.
            LocalError: `run` has not started.
        """
        if self._nursery is None:
            raise LocalError("join needs run() to be under way")
        others = [seed for seed in dict.fromkeys(seeds) if seed != self._address]
        reasons: dict[Address, str] = {}
        refusals: list[bool] = []

        async def try_seed(seed: Address) -> None:
            self._core.remember_seed(seed)
            try:
                await self._exchange(seed)
            except _CALL_FAILED as error:
                reasons[seed] = str(error)
                refusals.append(isinstance(error, PeerRefused))

        async with trio.open_nursery() as nursery:
            for seed in others:
                nursery.start_soon(try_seed, seed)
        if others and len(reasons) == len(others):
            raise JoinFailed(reasons, refused=any(refusals))
        return len(others) - len(reasons)

    def recall(self, addresses: list[Address]) -> None:
        """Tries peers' addresses from an earlier run, repeatedly while no member is known there. No answer is no error."""
        for address in addresses:
            if address != self._address:
                self._core.remember_seed(address)
        for address in addresses[:RECALLED_AT_ONCE]:
            if address != self._address:
                self._start_call(self._exchange, address)

    def publish(self, facts: Facts) -> None:
        """Publishes this node's facts: in its own view at once, on all nodes within milliseconds.

        Raises:
            LocalError: the record is larger than peers accept; the old one stays.
        """
        self._carry_out(self._core.publish(facts, trio.current_time()))

    def linked(self, node: NodeId) -> None:
        """Reports that a link with this peer is open, in either direction, its handshake done."""
        self._core.linked(node)

    def lost(self, node: NodeId, *, proven: bool = False) -> None:
        """Reports that a link to this peer broke: the peer is probed at once. Cheap; safe to call for every broken link.

        `proven`: `linked` had reported the link. Then a connect probe also checks whether the port is still open.
        """
        self._carry_out(self._core.lost(node, trio.current_time(), proven=proven))

    def note_load(self, node: NodeId, load: Load) -> None:
        """Stores a peer's load from its answer to a call: newer than the load in gossip."""
        if gossip.load_is_sane(load) and self._core.note_load(node, load, trio.current_time()):
            self._show(node)

    async def leave(self) -> None:
        """Announces the departure: datagrams to many peers, calls to a few, within a second. Nothing is sent after that."""
        now = trio.current_time()
        self._carry_out(self._core.leave(now))
        farewell_addresses = self._core.farewell_peers()
        tail = sync.encode(self._core.farewell(now))

        async def send_farewell(address: Address) -> None:
            try:
                await self._call(address, sync.SYNC_KIND, {}, tail, timeout_s=FAREWELL_TIMEOUT_S)
            except _CALL_FAILED:
                self._counts["calls_failed"] += 1

        with trio.move_on_after(FAREWELL_TIMEOUT_S, shield=True):
            async with trio.open_nursery() as nursery:
                for address in dict.fromkeys(farewell_addresses):
                    nursery.start_soon(send_farewell, address)

    def dump_trace(self) -> bytes | None:
        """Returns the recorded inputs as a file for `mesh simulate --replay`; None without `trace_bytes`."""
        return self._trace.dump() if self._trace is not None else None

    async def changed(self, since_version: int) -> View:
        """Waits for, and returns, a view newer than `since_version`."""
        while self.view.version <= since_version:
            await self._view_changed.wait()
        return self.view

    async def settled(self) -> None:
        """Returns when no losses are pending: those that belong together were all reported to `on_loss_batch`."""
        while not self._core.outlook.settled:
            await self._view_changed.wait()

    def subscribe(self, callback: Callable[[MemberEvent], None]) -> Callable[[], None]:
        """Calls `callback` with each change of a member, after the view shows it; it must not block or raise.

        Returns what ends the subscription.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    def statistics(self) -> MembershipStatistics:
        states = [peer.state for peer in self._peers.values()]
        return statistics_of(self._core, self.view, states, self._datagrams, self._counts, trio.current_time())

    async def _receive(self) -> None:
        while True:
            await self._datagrams.wait_readable()
            self._drain()
            await trio.lowlevel.checkpoint()

    async def _keep_time(self) -> None:
        while True:
            self._armed_for = self._core.deadline
            with trio.move_on_at(self._armed_for):
                await self._deadline_moved.wait()
            self._deadline_moved = trio.Event()
            if trio.current_time() >= self._core.deadline:
                self._drain()
                now = trio.current_time()
                self._core.set_load(self._load(), now)
                self._carry_out(self._core.tick(now))
                self._show(self.me)
                await trio.lowlevel.checkpoint()

    def _drain(self) -> None:
        self._core.set_load(self._load(), trio.current_time())
        for source, message, lay_s in self._datagrams.drain():
            now = trio.current_time()
            self._carry_out(self._core.receive(source, message, now, now - lay_s))

    def _carry_out(self, effects: list[MembershipEffect]) -> None:
        changed: list[NodeId] = []
        events: list[MemberEvent] = []
        batches: list[LossBatch] = []
        for effect in effects:
            match effect:
                case SendDatagram(to=to, message=message):
                    self._datagrams.send(to, message)
                case StartSync(to=to):
                    self._start_call(self._exchange, to)
                case PushFacts(to=to, sync=news):
                    self._start_call(self._push, to, news)
                case PingStream(seq=seq, to=to):
                    self._start_call(self._ping_stream, seq, to)
                case TryConnect(number=number, to=to):
                    self._start_call(self._try_connect, number, to)
                case WatchLinks(addresses=addresses):
                    self._keep_links(addresses)
                case LoadMeasured(node=node):
                    self._show(node)
                case FactsChanged(node=node):
                    changed.append(node)
                case MemberForgotten(node=node):
                    changed.append(node)
                case MemberChanged(node=node, before=before, after=after, restarted=restarted, stalled=stalled):
                    changed.append(node)
                    if before is not after or restarted or stalled:
                        events.append(MemberEvent(node, before, after, restarted, stalled))
                case EpochRenewed(epoch=epoch):
                    self.on_renewed(epoch)
                case LossBatch():
                    batches.append(effect)
                case ViewFrozen():
                    self._counts["freezes"] += effect.frozen
                case other:
                    self.twins.carry_out(other)
        if changed or batches or self.view.frozen is not self._core.outlook.frozen:
            self._refresh(changed)
        for event in events:
            for callback in list(self._subscribers):
                callback(event)
        for batch in batches:
            self.on_loss_batch(batch)
        if self._core.deadline < self._armed_for:
            self._deadline_moved.set()

    def _refresh(self, nodes: list[NodeId]) -> None:
        """Makes a new view with these peers as the core records them."""
        peers = dict(self._peers)
        for node in nodes:
            if (peer := self._core.peer(node)) is not None:
                peers[node] = peer
            else:
                peers.pop(node, None)
        self._peers = peers
        self.view = View(self.me, MappingProxyType(peers), self.view.version + 1, self._core.outlook.frozen)
        self._view_changed.set()
        self._view_changed = trio.Event()

    def _show(self, node: NodeId) -> None:
        """Updates load and round trip of a peer in the current view: soft state, without a new version or a copy."""
        peer = self._core.peer(node) if node in self._peers else None
        if peer is not None:
            self._peers[node] = peer

    def _start_call(self, job: Callable[..., Awaitable[None]], *args: object) -> None:
        if self._nursery is None or self._calls >= MAX_CALLS:
            self._counts["calls_skipped"] += 1
            return
        self._calls += 1
        self._nursery.start_soon(self._tried, job, args)

    async def _tried(self, job: Callable[..., Awaitable[None]], args: tuple[object, ...]) -> None:
        try:
            await job(*args)
        except _CALL_FAILED:
            self._counts["calls_failed"] += 1
        finally:
            self._calls -= 1

    async def _ping_stream(self, seq: int, to: Address) -> None:
        _, tail = await self._call(to, sync.SYNC_KIND, {}, sync.encode(sync.Sync()), timeout_s=STREAM_PING_TIMEOUT_S)
        try:
            by = sync.decode_synced(tail).node
        except sync.BadSync as error:
            raise RemoteError(format_address(to), str(error)) from None
        self._carry_out(self._core.stream_answered(seq, by, trio.current_time()))

    async def _try_connect(self, number: int, to: Address) -> None:
        refused = await self._knock(to)
        self._carry_out(self._core.tried(number, refused, trio.current_time()))

    async def _exchange(self, to: Address) -> None:
        """Runs one exchange. Raises the errors of a call, and RemoteError for an answer that cannot be decoded."""
        self._counts["exchanges"] += 1
        ask: sync.Sync | None = self._core.ask()
        for _ in range(MAX_ROUNDS):
            if ask is not None:
                ask = await self._ask_sync(to, ask)

    async def _ask_sync(self, to: Address, ask: sync.Sync) -> sync.Sync | None:
        _, tail = await self._call(to, sync.SYNC_KIND, {}, sync.encode(ask), timeout_s=EXCHANGE_TIMEOUT_S)
        try:
            synced = sync.decode_synced(tail)
        except sync.BadSync as error:
            raise RemoteError(format_address(to), str(error)) from None
        wanted, effects = self._core.learn(to, synced, trio.current_time())
        self._carry_out(effects)
        return wanted

    async def _push(self, to: Address, news: sync.Sync) -> None:
        self._counts["pushes"] += 1
        await self._call(to, sync.SYNC_KIND, {}, sync.encode(news), timeout_s=PUSH_TIMEOUT_S)

    async def _answer_sync(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        try:
            asked = sync.decode_sync(tail)
        except sync.BadSync as error:
            raise BadRequest(str(error)) from None
        synced, effects = self._core.answer(sender, asked, trio.current_time())
        self._carry_out(effects)
        return {}, sync.encode(synced)
