"""Membership as one state machine: SWIM, the facts book, and the exchanges that keep both equal everywhere.

The shell is `membership.shell.service`; `tests/sim` drives the same class by the hundred on a virtual clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from membership.core.allowance import Allowance
from membership.core.config import MembershipConfig
from membership.core.effects import EpochRenewed, FactsChanged, MemberChanged, MemberForgotten, MembershipEffect, PushFacts
from membership.core.members import SEVERITY, Member, Members
from membership.core.outlook import LossBatching
from membership.core.regions import some_gossip_peers
from membership.core.swim import Swim
from membership.facts.facts import DELTAS_BYTES, FactsBook
from membership.facts.fingerprint import Fingerprint
from membership.facts.owner_map import DeltaOutcome
from mesh.ids import Address, NodeId
from mesh.keys.signing import Signer
from mesh.view import Facts, Load, Peer
from mesh.wire.gossip import Alive, GossipMessage, Suspect
from mesh.wire.sync import MAX_SYNC_BYTES, DigestEntry, FactsDelta, FactsWanted, Known, MemberRecord, Sync, Synced
from mesh.wire.twin import ProcessRun, TwinAnswer

if TYPE_CHECKING:
    from random import Random

_RECORD_BYTES = 280  # upper bound of one member record on the wire
_MAX_MEMBERS = (MAX_SYNC_BYTES - DELTAS_BYTES - 400_000) // _RECORD_BYTES  # leaves room for deltas and wanted facts
# Followed by the facts book and the outlook. Compared by exact type: `isinstance` on every effect costs ten times as much.
_FOLLOWED = frozenset((MemberChanged, MemberForgotten, EpochRenewed))
FAREWELL_PUSHES = 3
MAX_FAREWELL_PUSHES = 64
_MAX_PASS_ON = 8  # records of one exchange passed on at once: more means that this node was behind, not the others


class MembershipCore:
    """The membership state machine of one node."""

    def __init__(
        self, me: Alive, signer: Signer, config: MembershipConfig, rng: Random, now: float, table: type[Members] = Members
    ) -> None:
        """`me`: the description of this run of the node; it is signed here. `table`: the class of the member table."""
        fingerprint = Fingerprint()
        self.me: NodeId = me.node
        self.config = config
        self.rng = rng
        self.swim = Swim(me, signer, config, rng, now, fingerprint, table)
        self.facts = FactsBook(me.node, me.epoch, fingerprint)
        self.outlook = LossBatching(self.swim.members, now)
        self.allowance = Allowance(self.swim.members)

    @property
    def deadline(self) -> float:
        return self.swim.deadline if self.swim.state.left else min(self.swim.deadline, self.outlook.deadline)

    @property
    def fingerprint(self) -> int:
        return self.swim.members.fingerprint.value

    def receive(
        self, source: Address, message: GossipMessage, now: float, arrived_at: float | None = None
    ) -> list[MembershipEffect]:
        if not self.allowance.credit(source, message, now):
            return []
        return self._settled(self.swim.receive(source, message, now, arrived_at), now)

    def tick(self, now: float) -> list[MembershipEffect]:
        effects = self._settled(self.swim.tick(now), now)
        return effects if self.swim.state.left else effects + self.outlook.tick(now)

    def lost(self, node: NodeId, now: float, *, proven: bool = False) -> list[MembershipEffect]:
        return self._settled(self.swim.lost(node, now, proven=proven), now)

    def linked(self, node: NodeId) -> None:
        self.swim.refusals.link_made(node)

    def stream_answered(self, seq: int, by: NodeId, now: float) -> list[MembershipEffect]:
        return self._settled(self.swim.stream_answered(seq, by, now), now)

    def tried(self, number: int, refused: bool | None, now: float) -> list[MembershipEffect]:
        return self._settled(self.swim.tried(number, refused, now), now)

    def remember_seed(self, address: Address) -> None:
        """Keeps trying this address for as long as no live member has it."""
        self.swim.remember_seed(address)

    def twin_asked(self, by: ProcessRun, now: float) -> tuple[TwinAnswer, list[MembershipEffect]]:
        """Returns the answer to a process that claims this node's identity."""
        return self.swim.refutation.asked(by, now)

    def twin_found(self, place: Address, answer: TwinAnswer | None, now: float) -> list[MembershipEffect]:
        """Applies the outcome of a `FindTwin`: the verified answer of a process with this node's identity, or None."""
        return self._settled(self.swim.refutation.found(place, answer, now) + self.swim.spread(now), now)

    def leave(self, now: float) -> list[MembershipEffect]:
        return self.swim.leave(now)

    def set_load(self, load: Load, now: float) -> None:
        self.swim.state.set_load(load, now)

    def note_load(self, node: NodeId, load: Load, now: float) -> bool:
        """Stores load from a peer's answer to a call. Returns whether the peer is a live member."""
        member = self.swim.members.get(node)
        if member is None or not member.live or node == self.me:
            return False
        member.load, member.load_at, member.last_message_at = load, now, now
        return True

    def publish(self, facts: Facts, now: float) -> list[MembershipEffect]:
        """Publishes this node's facts. Raises LocalError when they are larger than peers accept."""
        news = self.facts.publish(facts)
        return [] if news is None else [FactsChanged(self.me), *self._pushes((news,), now, ())]

    def peer(self, node: NodeId) -> Peer | None:
        """Returns the node as the view shows it; None once it was forgotten."""
        member = self.swim.members.get(node)
        if member is None:
            return None
        load, load_at = (self.swim.state.load, self.swim.state.load_at) if node == self.me else (member.load, member.load_at)
        return Peer(
            member.node,
            member.name,
            member.address,
            member.region,
            member.state,
            member.epoch,
            member.incarnation,
            self.facts.of(node, member.epoch),
            load,
            load_at,
            member.rtt_s,
            self.swim.state.distances.estimate_s(member) if node != self.me else None,
            member.cause,
        )

    # exchanges: ask -> answer -> learn -> answer -> learn

    def ask(self) -> Sync:
        """Returns the opening message of an exchange: a digest of all members."""
        return Sync(digest=tuple(self._entry(member) for member in self.swim.members))

    def answer(self, asker: NodeId, sync: Sync, now: float) -> tuple[Synced, list[MembershipEffect]]:
        """Answers a peer that opened an exchange, sends facts that this node requested, or pushes facts.

        The answer carries the records and facts that the asker lacks, and names those that this node lacks.
        """
        effects = self._learn(asker, sync.members, sync.deltas, now, pushed=not sync.digest)
        if not sync.digest or self.swim.state.left:
            return Synced(self.me), effects
        mine = {entry.node: entry for entry in sync.digest}
        self._refute_verdict_on_me(asker, mine.get(self.me), now)
        effects += self._settled(self.swim.spread(now), now)
        wanted: list[FactsWanted] = []
        members: list[MemberRecord] = []
        behind: dict[NodeId, Known] = {}
        for node in sorted({*mine, *(member.node for member in self.swim.members)}):
            theirs, member = mine.get(node), self.swim.members.peek(node)
            ours = self._entry(member) if member is not None else None
            if theirs is not None and (ours is None or _is_ahead(theirs, ours)):
                wanted.append(FactsWanted(node, *self.facts.known(node)))
            if member is not None and ours is not None and (theirs is None or _is_ahead(ours, theirs)):
                members.append(member.record(now))
                if (known := _facts_of(theirs) if theirs is not None else (0, 0)) < _facts_of(ours):
                    behind[node] = known
        deltas, cut = self.facts.deltas(behind)
        more = cut or len(members) > _MAX_MEMBERS
        return Synced(self.me, tuple(members[:_MAX_MEMBERS]), tuple(deltas), tuple(wanted), more), effects

    def learn(self, source: Address, synced: Synced, now: float) -> tuple[Sync | None, list[MembershipEffect]]:
        """Applies the answer of `source`; returns the next message, if facts are requested or the answer was incomplete."""
        self.swim.met_seed(source, synced.node)
        effects = self._learn(synced.node, synced.members, synced.deltas, now, pushed=False)
        if self.swim.state.left or not (synced.wanted or synced.more):
            return None, effects
        behind = {want.node: (want.facts_epoch, want.facts_version) for want in synced.wanted if want.node in self.swim.members}
        # A message that also requests the rest carries a digest, so half the space is left.
        half = 2 if synced.more else 1
        members = tuple(self.swim.members[node].record(now) for node in list(behind)[: _MAX_MEMBERS // half])
        deltas, _ = self.facts.deltas(behind, DELTAS_BYTES // half)
        return Sync(self.ask().digest if synced.more else (), members, tuple(deltas)), effects

    def farewell_peers(self) -> list[Address]:
        """Returns the peers to inform of the departure by call, after `leave`: first those with a link, then some at random.

        A peer with a link must be informed before the link ends, or it would take the end for a death.
        """
        peers = [member for member in self.swim.members if member.live and member.node != self.me]
        linked = [member.address for member in peers if member.node in self.swim.state.linked][:MAX_FAREWELL_PUSHES]
        return linked + [member.address for member in self.rng.sample(peers, min(FAREWELL_PUSHES, len(peers)))]

    def farewell(self, now: float) -> Sync:
        """Returns the push that informs a peer, by call, that this node left."""
        return Sync(members=(self.swim.myself.record(now),))

    def _learn(
        self,
        source: NodeId,
        members: tuple[MemberRecord, ...],
        deltas: tuple[FactsDelta, ...],
        now: float,
        *,
        pushed: bool,
    ) -> list[MembershipEffect]:
        if self.swim.state.left:
            return []
        newcomers = sum(member.node not in self.swim.members for member in members)
        for member in members:
            # Many newcomers at once mean that this node was behind: the others have them already.
            pass_on = newcomers <= _MAX_PASS_ON or member.node == source
            self.swim.claims.apply_record(member, now, pass_on=pass_on)
        news, gap = self._accept(deltas)
        if gap and source in self.swim.members:
            self.swim.state.request_exchange(self.swim.members[source].address, now)
        effects: list[MembershipEffect] = [FactsChanged(owner) for owner in news]
        passed_on = news if pushed or len(news) <= _MAX_PASS_ON else {owner: news[owner] for owner in news if owner == source}
        effects = self._settled(self.swim.spread(now), now) + effects
        # The source holds what it sent, except where it was ahead about this node's own facts: then it gets the outcome too.
        current = tuple(delta for owner, delta in passed_on.items() if delta is not None and self.swim.members[owner].live)
        return effects + self._pushes(current, now, () if self.me in passed_on else (source,))

    def _accept(self, deltas: tuple[FactsDelta, ...]) -> tuple[dict[NodeId, FactsDelta | None], bool]:
        """Applies deltas of members; returns the news of each owner, to pass on, and whether earlier writes are missing."""
        news: dict[NodeId, FactsDelta | None] = {}
        gap = False
        for delta in deltas:
            if delta.owner in self.swim.members:
                outcome, passed_on = self.facts.accept(delta)
                gap |= outcome is DeltaOutcome.GAP
                if outcome is DeltaOutcome.NEWS:
                    news[delta.owner] = passed_on
        return news, gap

    def _refute_verdict_on_me(self, asker: NodeId, entry: DigestEntry | None, now: float) -> None:
        """Refutes an accusation of this node in the asker's digest before the answer is made, so that the answer corrects it."""
        if entry is not None and SEVERITY[entry.state] > 0:
            self.swim.claims.apply(Suspect(self.me, entry.epoch, entry.incarnation, asker), now)

    def _pushes(self, news: tuple[FactsDelta, ...], now: float, without: tuple[NodeId, ...]) -> list[MembershipEffect]:
        """Returns pushes of the news to a few peers, within the size of one message: exchanges bring the rest."""
        kept: list[FactsDelta] = []
        left_bytes = DELTAS_BYTES
        for delta in news:
            if (left_bytes := left_bytes - delta.size_bytes) >= 0:
                kept.append(delta)
        if not kept:
            return []
        # With the member record: facts of a newcomer may overtake the datagram that announces it.
        members = tuple(self.swim.members[delta.owner].record(now) for delta in kept)
        sync = Sync(members=members, deltas=tuple(kept))
        owners = (kept[0].owner,) if len(kept) == 1 else ()
        peers = some_gossip_peers(self.swim.members, self.config.push_peers, self.rng, (*without, *owners))
        return [PushFacts(self.swim.members.address_of(peer), sync) for peer in peers]

    def _entry(self, member: Member) -> DigestEntry:
        return DigestEntry(member.node, member.epoch, member.incarnation, member.state, *self.facts.known(member.node))

    def _settled(self, effects: list[MembershipEffect], now: float) -> list[MembershipEffect]:
        """Applies changes of members to the facts book and the outlook, and drops what the allowance does not cover."""
        notices = [effect for effect in effects if type(effect) in _FOLLOWED]
        if not notices:
            return self.allowance.covered(effects)
        outlook = self.outlook.follow(notices, now)
        for effect in notices:
            match effect:
                case MemberForgotten(node=node):
                    self.facts.forget(node)
                case EpochRenewed(epoch=epoch):
                    if (news := self.facts.renew(epoch)) is not None:
                        effects = [*effects, FactsChanged(self.me), *self._pushes((news,), now, ())]
        return self.allowance.covered(effects) + outlook


def _facts_of(entry: DigestEntry) -> tuple[int, int]:
    return entry.facts_epoch, entry.facts_version


def _is_ahead(one: DigestEntry, other: DigestEntry) -> bool:
    """Returns whether the first entry is newer than the second, in state or in facts."""
    standing = (one.epoch, one.incarnation, SEVERITY[one.state])
    return standing > (other.epoch, other.incarnation, SEVERITY[other.state]) or _facts_of(one) > _facts_of(other)
