"""A membership core that records its inputs for `membership.trace.replay`. It makes no decisions of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import MembershipEffect
from membership.trace import trace_format
from membership.trace.trace_format import Trace, TraceRecord, answer_hash
from mesh.ids import Address, NodeId
from mesh.keys.signing import SignatureVerifier, Signer
from mesh.view import Facts, Load, PeerState
from mesh.wire.gossip import Alive, GossipMessage
from mesh.wire.sync import DigestEntry, Sync, Synced
from mesh.wire.twin import ProcessRun, TwinAnswer

if TYPE_CHECKING:
    from random import Random

T = TypeVar("T")


class RecordedSigner:
    """Signs with another signer, and keeps the signatures until they are taken."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._made: list[bytes] = []

    @property
    def public_key(self) -> bytes:
        return self._signer.public_key

    @property
    def verifier(self) -> SignatureVerifier:
        return self._signer.verifier

    def sign(self, statement: bytes) -> bytes:
        self._made.append(self._signer.sign(statement))
        return self._made[-1]

    def taken(self) -> tuple[bytes, ...]:
        made, self._made = tuple(self._made), []
        return made


class RecordedCore(MembershipCore):
    """`rng` is seeded anew, with a seed that the trace records, here and at the start of each segment."""

    def __init__(self, me: Alive, signer: Signer, config: MembershipConfig, rng: Random, now: float, kept: Trace) -> None:
        self._kept, self._signer = kept, RecordedSigner(signer)
        self._seeds_known: dict[Address, None] = {}
        seed = self._sown(rng)
        super().__init__(me, self._signer, config, rng, now)
        self._keep(trace_format.StartInput(now, me, signer.public_key, asdict(config), seed), None)

    def receive(
        self, source: Address, message: GossipMessage, now: float, arrived_at: float | None = None
    ) -> list[MembershipEffect]:
        receive = super().receive
        return self._played(
            trace_format.DatagramInput(now, source, message, arrived_at), lambda: receive(source, message, now, arrived_at)
        )

    def tick(self, now: float) -> list[MembershipEffect]:
        tick = super().tick
        return self._played(trace_format.TickInput(now), lambda: tick(now))

    def lost(self, node: NodeId, now: float, *, proven: bool = False) -> list[MembershipEffect]:
        lost = super().lost
        return self._played(trace_format.LinkLostInput(now, node, proven), lambda: lost(node, now, proven=proven))

    def linked(self, node: NodeId) -> None:
        linked = super().linked
        self._played(trace_format.LinkUpInput(0.0, node), lambda: linked(node))

    def stream_answered(self, seq: int, by: NodeId, now: float) -> list[MembershipEffect]:
        stream_answered = super().stream_answered
        return self._played(trace_format.StreamAnsweredInput(now, seq, by), lambda: stream_answered(seq, by, now))

    def tried(self, number: int, refused: bool | None, now: float) -> list[MembershipEffect]:
        tried = super().tried
        return self._played(trace_format.ConnectTriedInput(now, number, refused), lambda: tried(number, refused, now))

    def twin_asked(self, by: ProcessRun, now: float) -> tuple[TwinAnswer, list[MembershipEffect]]:
        twin_asked = super().twin_asked
        return self._played(trace_format.TwinAskedInput(now, by), lambda: twin_asked(by, now))

    def twin_found(self, place: Address, answer: TwinAnswer | None, now: float) -> list[MembershipEffect]:
        twin_found = super().twin_found
        return self._played(trace_format.TwinFoundInput(now, place, answer), lambda: twin_found(place, answer, now))

    def leave(self, now: float) -> list[MembershipEffect]:
        leave = super().leave
        return self._played(trace_format.LeaveInput(now), lambda: leave(now))

    def set_load(self, load: Load, now: float) -> None:
        set_load = super().set_load
        self._played(trace_format.LoadInput(now, load), lambda: set_load(load, now))

    def note_load(self, node: NodeId, load: Load, now: float) -> bool:
        note_load = super().note_load
        return self._played(trace_format.LoadNotedInput(now, node, load), lambda: note_load(node, load, now))

    def publish(self, facts: Facts, now: float) -> list[MembershipEffect]:
        publish = super().publish
        return self._played(trace_format.FactsPublishedInput(now, facts), lambda: publish(facts, now))

    def answer(self, asker: NodeId, sync: Sync, now: float) -> tuple[Synced, list[MembershipEffect]]:
        answer = super().answer
        return self._played(trace_format.SyncAskedInput(now, asker, sync), lambda: answer(asker, sync, now))

    def learn(self, source: Address, synced: Synced, now: float) -> tuple[Sync | None, list[MembershipEffect]]:
        learn = super().learn
        return self._played(trace_format.SyncAnsweredInput(now, source, synced), lambda: learn(source, synced, now))

    def remember_seed(self, address: Address) -> None:
        remember_seed = super().remember_seed
        self._seeds_known[address] = None
        self._played(trace_format.SeedKnownInput(0.0, address), lambda: remember_seed(address))

    def _played(self, given: trace_format.Input, play: Callable[[], T]) -> T:
        if self._kept.full and given.now > 0:
            self._checkpoint(given.now)
        answer = play()
        self._keep(given, answer)
        return answer

    def _keep(self, given: trace_format.Input, answer: object) -> None:
        self._kept.add(TraceRecord(given, self._signer.taken(), answer_hash(answer)))

    def _checkpoint(self, now: float) -> None:
        """Records the answer that a newcomer would get, and the rest of the state that a replay needs."""
        me = self.swim.myself
        known = answer_to_newcomer(self, now)
        links = tuple(node for node, count in sorted(self.swim.state.linked.items()) for _ in range(count))
        self._kept.begin_segment()
        words, seed = me.alive_claim(), self._sown(self.rng)
        self._keep(trace_format.CheckpointInput(now, words, seed, known, links, tuple(self._seeds_known)), None)

    def _sown(self, rng: Random) -> int:
        seed = rng.getrandbits(62)
        rng.seed(seed)
        return seed


def answer_to_newcomer(core: MembershipCore, now: float) -> Synced:
    """Returns the answer to a newcomer's digest. A replay calls it too: the order of later deltas depends on it."""
    me = core.swim.myself
    own = DigestEntry(core.me, me.epoch, me.incarnation, PeerState.ALIVE, *core.facts.known(core.me))
    return MembershipCore.answer(core, core.me, Sync(digest=(own,)), now)[0]
