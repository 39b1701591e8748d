"""A mesh of real membership cores on a virtual clock and a network of our own making: one seed, one trace.

Time moves from event to event. Datagrams may be lost, late or cut off (also one way); calls travel
with the same delays, and fail where the network is split or no process runs. A paused node is one under SIGSTOP:
its datagrams wait in a bounded socket buffer and are read, all of them, before its timers fire.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from copy import copy
from random import Random

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import (
    FactsChanged,
    LoadMeasured,
    LossBatch,
    MemberChanged,
    MembershipEffect,
    PingStream,
    PushFacts,
    SendDatagram,
    StartSync,
    TryConnect,
    WatchLinks,
)
from membership.simulation import twins
from membership.simulation.nodes import Carried, ObservedChange, SimNode
from membership.simulation.shared_members import SharedMembers, SharedRecords
from membership.simulation.signer import StandInSigner
from membership.simulation.timeline import VirtualTime
from membership.simulation.ways import LatencyModel, TimeSpan
from mesh.ids import Address, NodeId
from mesh.keys.seal import KeySeal
from mesh.keys.signing import Signer
from mesh.view import Facts, PeerState
from mesh.wire import datagram_codec, sync
from mesh.wire.gossip import MAX_MESSAGE_BYTES, Alive, GossipMessage

SOCKET_BUFFER_DATAGRAMS = 150  # about what Linux keeps of small datagrams in its default 212 KiB
SEAL_BYTES = KeySeal.overhead_bytes
CONNECT_TIMEOUT_S = 1.0
MAX_ROUNDS = 8  # as in the service


def sharing_core(me: Alive, signer: Signer, config: MembershipConfig, rng: Random, now: float) -> MembershipCore:
    """A membership core whose member table shares the records that all nodes have in common."""
    return MembershipCore(me, signer, config, rng, now, SharedMembers)


class Network(VirtualTime):
    """All simulated nodes, the network between them, and the record of changes."""

    def __init__(
        self,
        seed: int,
        *,
        config: MembershipConfig | None = None,
        loss: float = 0.0,
        delay_s: TimeSpan = (0.0005, 0.002),
        far_s: TimeSpan | None = None,
        core: Callable[[Alive, Signer, MembershipConfig, Random, float], MembershipCore] = sharing_core,
        encoded: bool = True,
    ) -> None:
        """`delay_s`: of one way; `far_s`: between two regions, if that takes longer; `core`: makes each node's.

        `encoded`: datagrams travel as bytes. Else as the structs that the bytes stand for, with the size they would have:
        half the work, and the same events, which a test holds against one another.
        """
        super().__init__()
        self.rng = Random(seed)
        self.config = config or MembershipConfig()
        self._core, self.loss = core, loss
        self.ways = LatencyModel(self.rng, delay_s, far_s)
        self.nodes: dict[NodeId, SimNode] = {}
        self.seen: list[ObservedChange] = []
        self.facts_seen: list[tuple[float, NodeId, NodeId]] = []
        self.cuts: list[tuple[float, NodeId, LossBatch]] = []
        self.largest_bytes = 0
        self._at: dict[Address, NodeId] = {}
        self._encoded = encoded
        self._trace = hashlib.blake2b(digest_size=16)

    # disturbances by a test

    def add(
        self,
        seeds: Iterable[NodeId] = (),
        *,
        number: int | None = None,
        epoch: int = 1,
        name: str | None = None,
        address: Address | None = None,
        region: str = "",
        twin_of: NodeId | None = None,
    ) -> NodeId:
        """Starts a node, or starts it again under its old id with another `epoch`, and joins it through `seeds`.

        `twin_of`: with the identity of that node, which goes on too; the id returned is what the simulation calls it."""
        number = len(self.nodes) if number is None else number
        node = NodeId(f"{number:016x}")
        address = address or (f"10.0.{number // 250}.{number % 250 + 1}", 7946 + epoch)
        claim = Alive(twin_of or node, epoch, 0, name or f"node-{number}", address[0], address[1], region)
        self.ways.place(node, region)
        core = self._core(claim, StandInSigner(claim.node), self.config, Random(self.rng.random()), self.now)
        old = self.nodes.get(node)
        if old is not None:
            for other in sorted(old.links):
                self._break_link(old, self.nodes[other])
            old.running = False
            self._at.pop(old.address, None)
        self.nodes[node] = SimNode(node, address, core, epoch, self.now)
        self._at[address] = node
        for seed in seeds:
            core.remember_seed(self.nodes[seed].address)
            self._exchange(self.nodes[node], self.nodes[seed].address)
        self._arm(self.nodes[node])
        return node

    def grow(self, count: int, *, settle_s: float = 3.0) -> list[NodeId]:
        """Makes a mesh of `count` nodes, all joined at once through the first, and lets it converge."""
        first = self.add()
        ids = [first, *(self.add([first]) for _ in range(count - 1))]
        self.run(settle_s)
        return ids

    def found(self, count: int) -> list[NodeId]:
        """Makes a mesh of `count` nodes with complete views and links from the start: for sizes where joining takes long."""
        ids = [self.add() for _ in range(count)]
        records = SharedRecords(copy(self.nodes[node].core.swim.myself) for node in ids)
        for node in ids:
            it = self.nodes[node]
            table = it.core.swim.members
            assert isinstance(table, SharedMembers), "a core made for a network has a table that shares"
            table.found(records)
            self.carry_out(it, it.core.swim.refusals.watch())
        self.run(0.1)
        return ids

    def kill(self, node: NodeId) -> None:
        """Stops a node silently, as when its host or its cable fails."""
        self.nodes[node].running = False

    def crash(self, node: NodeId) -> None:
        """Stops a node as by kill -9 on a host that stays up: its links end within milliseconds; connections are refused."""
        it = self.nodes[node]
        it.running, it.refuses = False, True
        for other in sorted(it.links):
            self._break_link(it, self.nodes[other])

    def break_links(self, node: NodeId) -> None:
        """Ends the links of a live node, as when a firewall drops them."""
        it = self.nodes[node]
        for other in sorted(it.links):
            self._break_link(it, self.nodes[other])
            self._break_link(self.nodes[other], it)

    def pause(self, node: NodeId) -> None:
        self.nodes[node].paused = True

    def starve(self, node: NodeId, late_s: tuple[float, float] = (0.5, 2.5)) -> None:
        """Starves a process: inputs wait in the socket, while timers fire on time."""
        self.nodes[node].starved_s = late_s

    def resume(self, node: NodeId) -> None:
        """Continues a process as by SIGCONT: all input in the buffer is read before any timer fires."""
        it = self.nodes[node]
        it.paused = False
        waiting, it.buffer = it.buffer, []
        for source, carried in waiting:
            self._receive(it, source, carried, None)
        it.armed_for = math.inf
        self._arm(it)

    def cut(self, some: Iterable[NodeId], others: Iterable[NodeId], *, one_way: bool = False) -> None:
        """Blocks all messages from `some` to `others`, and back unless `one_way`."""
        self.ways.cut(some, others, one_way=one_way)

    def heal(self) -> None:
        self.ways.heal()

    def publish(self, node: NodeId, facts: Facts) -> None:
        it = self.nodes[node]
        self.carry_out(it, it.core.publish(facts, self.now))

    def lost(self, by: NodeId, node: NodeId) -> None:
        it = self.nodes[by]
        self.carry_out(it, it.core.lost(node, self.now))

    def leave(self, node: NodeId) -> None:
        """Makes a node leave, by datagrams and by calls to three peers, and stops it."""
        it = self.nodes[node]
        peers = it.core.swim.members.some_peers(3, self.rng) + sorted(it.core.swim.state.linked)
        self.carry_out(it, it.core.leave(self.now))
        for peer in peers:
            self._call(it, it.core.swim.members.address_of(peer), it.core.farewell(self.now), lambda _: None)
        self.crash(node)

    # queries of a test

    @property
    def up(self) -> list[NodeId]:
        return [it.id for it in self.nodes.values() if it.running]

    def state(self, by: NodeId, node: NodeId) -> PeerState | None:
        member = self.nodes[by].core.swim.members.peek(node)
        return member.state if member is not None else None

    def trace(self) -> str:
        """Returns a digest that is equal for two runs with the same events in the same order at the same times."""
        return self._trace.hexdigest()

    # the network

    def _arm(self, it: SimNode) -> None:
        it.due_at = deadline = it.core.deadline
        if deadline < it.armed_for:
            self._wake_later(it)

    def _wake_later(self, it: SimNode) -> None:
        it.armed_for = deadline = it.due_at
        self._events.put(self.now + max(0.0, deadline - self.now), self._wake, (it, deadline))

    def _wake(self, it: SimNode, armed_for: float) -> None:
        if not it.running or it.paused or it.armed_for != armed_for or self.nodes[it.id] is not it:
            return
        it.armed_for = math.inf
        if self.now >= it.due_at:
            self.carry_out(it, it.core.tick(self.now))
        else:
            self._wake_later(it)

    def carry_out(self, it: SimNode, effects: list[MembershipEffect]) -> None:
        for effect in effects:
            if type(effect) is SendDatagram:  # these two are nearly all
                self._send(it, effect.to, effect.message)
            elif type(effect) is not LoadMeasured:
                self._carry_out_rare(it, effect)
        self._arm(it)

    def _carry_out_rare(self, it: SimNode, effect: MembershipEffect) -> None:
        match effect:
            case StartSync(to=to):
                self._exchange(it, to)
            case PushFacts(to=to, sync=news):
                self._call(it, to, news, lambda _: None)
            case MemberChanged(node=node, before=before, after=after, restarted=restarted):
                self.seen.append(ObservedChange.of(self.now, it, self.nodes.get(node), node, before, after, restarted))
                self._trace.update(f"{self.now!r} {it.id} {node} {before} {after}\n".encode())
            case PingStream(seq=seq, to=to):
                self._ping_stream(it, seq, to)
            case TryConnect(number=number, to=to):
                self._try_connect(it, number, to)
            case WatchLinks(addresses=addresses):
                for address in addresses:
                    self._open_link(it, address)
            case LossBatch():
                self.cuts.append((self.now, it.id, effect))
            case FactsChanged(node=node):
                self.facts_seen.append((self.now, it.id, node))
            case _:
                twins.carry_out(self, it, effect)

    def connects(self, it: SimNode, to: Address) -> SimNode | None:
        """Returns the node with a socket at `to`, if it can be reached; the kernel of a paused process still answers."""
        target = self._at.get(to)
        if target is None or not self.ways.passes(it.id, target) or not self.ways.passes(target, it.id):
            return None
        return self.nodes[target]

    def _ping_stream(self, it: SimNode, seq: int, to: Address) -> None:
        def answered(tail: bytes) -> None:
            self.carry_out(it, it.core.stream_answered(seq, sync.decode_synced(tail).node, self.now))

        self._call(it, to, sync.Sync(), answered)

    def _try_connect(self, it: SimNode, number: int, to: Address) -> None:
        peer = self.connects(it, to)
        answers = peer is not None and (peer.running or peer.refuses)

        def come_back() -> None:
            if it.running and not it.paused and self.nodes[it.id] is it:
                refused = None if not answers else peer is not None and (peer.refuses_all or (peer.refuses and not peer.running))
                self.carry_out(it, it.core.tried(number, refused, self.now))

        self.later(2 * self.ways.delay_s(it.id, peer.id) if peer is not None and answers else CONNECT_TIMEOUT_S, come_back)

    def _open_link(self, it: SimNode, to: Address) -> None:
        peer = self.connects(it, to)
        if peer is None or peer.id in it.links:
            return

        def opened() -> None:
            if it.running and peer.running and not it.paused and not peer.paused and peer.id not in it.links:
                it.links.add(peer.id)
                peer.links.add(it.id)
                it.core.linked(peer.core.me)
                peer.core.linked(it.core.me)

        self.later(4 * self.ways.delay_s(it.id, peer.id), opened)

    def _break_link(self, gone: SimNode, other: SimNode) -> None:
        """Reports the end of a link to `other`, unless the route between them is blocked: then nothing arrives."""
        other.links.discard(gone.id)

        def link_ended() -> None:
            if other.running and not other.paused and self.ways.passes(gone.id, other.id):
                self.carry_out(other, other.core.lost(gone.core.me, self.now, proven=True))

        self.later(self.rng.uniform(0.001, 0.006) + self.ways.delay_s(gone.id, other.id), link_ended)

    def _send(self, it: SimNode, to: Address, message: GossipMessage) -> None:
        carried: Carried
        if self._encoded:
            carried = datagram_codec.encode(message)
            size_bytes = len(carried)
        else:
            carried, size_bytes = message, datagram_codec.encoded_bytes(message)
        if size_bytes > self.largest_bytes:
            assert size_bytes <= MAX_MESSAGE_BYTES, f"a datagram of {size_bytes} bytes"
            self.largest_bytes = size_bytes
        it.bytes_sent += size_bytes + SEAL_BYTES
        it.datagrams_sent += 1
        if self.rng.random() >= self.loss:
            receiver = self._at.get(to, it.id)
            self.ways.carried(it.id, receiver, size_bytes + SEAL_BYTES)
            self._events.put(self.now + self.ways.delay_s(it.id, receiver), self._arrive, (it, to, carried))

    def _arrive(self, it: SimNode, to: Address, carried: Carried) -> None:
        target = self._at.get(to)
        if target is None or not self.ways.passes(it.id, target):
            return
        peer = self.nodes[target]
        if not peer.running:
            return
        if peer.paused:
            if len(peer.buffer) < SOCKET_BUFFER_DATAGRAMS:
                peer.buffer.append((it.address, carried))
        elif peer.starved_s is None:
            self._receive(peer, it.address, carried, self.now)
        else:
            self._when_read(peer, lambda arrived_at: self._receive(peer, it.address, carried, arrived_at))

    def _when_read(self, it: SimNode, take: Callable[[float], None]) -> None:
        """Delivers an input to `it`: at once, or as late as a starved process reads."""
        if it.starved_s is None:
            take(self.now)
            return
        it.read_until = max(it.read_until, self.now + self.rng.uniform(*it.starved_s))
        self.later(it.read_until - self.now, self._read, it, take, self.now)

    def _read(self, it: SimNode, take: Callable[[float], None], arrived_at: float) -> None:
        if it.running and not it.paused:
            take(arrived_at)

    def _receive(self, it: SimNode, source: Address, carried: Carried, arrived_at: float | None) -> None:
        message = datagram_codec.decode(carried) if isinstance(carried, bytes) else carried
        self.carry_out(it, it.core.receive(source, message, self.now, arrived_at))

    def _exchange(self, it: SimNode, to: Address) -> None:
        rounds = iter(range(MAX_ROUNDS))

        def exchange_round(ask: sync.Sync) -> None:
            if next(rounds, None) is not None:
                self._call(it, to, ask, answered)

        def answered(tail: bytes) -> None:
            ask, effects = it.core.learn(to, sync.decode_synced(tail), self.now)
            self.carry_out(it, effects)
            if ask is not None:
                exchange_round(ask)

        exchange_round(it.core.ask())

    def _call(self, it: SimNode, to: Address, ask: sync.Sync, answered: Callable[[bytes], None]) -> None:
        """Makes a peer call over a stream: it fails only where there is no route or no process."""
        tail = sync.encode(ask)
        it.bytes_sent += len(tail)

        def arrive() -> None:
            target = self._at.get(to)
            if target is None or not self.ways.passes(it.id, target) or not self.ways.passes(target, it.id):
                return
            peer = self.nodes[target]
            if peer.running and not peer.paused:
                self._when_read(peer, lambda arrived_at: answer(peer))

        def answer(peer: SimNode) -> None:
            synced, effects = peer.core.answer(it.core.me, sync.decode_sync(tail), self.now)
            self.carry_out(peer, effects)
            reply = sync.encode(synced)
            peer.bytes_sent += len(reply)

            def come_back() -> None:
                if it.running and not it.paused:
                    self._when_read(it, lambda arrived_at: answered(reply))

            self.ways.carried(peer.id, it.id, len(reply))
            self.later(self.ways.delay_s(peer.id, it.id), come_back)

        receiver = self._at.get(to, it.id)
        self.ways.carried(it.id, receiver, len(tail))
        self.later(self.ways.delay_s(it.id, receiver), arrive)
