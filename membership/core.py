"""Membership as one state machine: SWIM, the facts book, and the exchanges that keep both equal everywhere.

The shell is `membership.service`; `tests/sim` drives the same class by the hundred on a virtual clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from membership.config import MembershipConfig
from membership.effects import Effect, FactsChanged, MemberForgotten, Push, Renewed
from membership.facts import FactsBook
from membership.fingerprint import Fingerprint
from membership.members import SEVERITY, Member
from membership.swim import Swim
from mesh.gossip import Alive, Message, Suspect
from mesh.ids import Address, NodeId
from mesh.signing import Signer
from mesh.sync import MAX_SYNC_BYTES, DigestEntry, FactsRecord, MemberRecord, Sync, Synced
from mesh.view import Facts, Load, Peer

if TYPE_CHECKING:
    from random import Random

_RECORD_BYTES = 280  # upper bound of one member record on the wire
_REPLY_BYTES = MAX_SYNC_BYTES - 65_536  # leaves room for the digest and the list of what is wanted
_PASS_ON_MAX = 8  # records of one exchange passed on at once: more means that we, not the others, were behind


class MembershipCore:
    """One node's share of the mesh's common knowledge."""

    def __init__(self, me: Alive, signer: Signer, config: MembershipConfig, rng: Random, now: float) -> None:
        """`me`: as this run of the node is described; it is signed here."""
        fingerprint = Fingerprint()
        self.me: NodeId = me.node
        self.config = config
        self.rng = rng
        self.swim = Swim(me, signer, config, rng, now, fingerprint)
        self.facts = FactsBook(me.node, me.epoch, fingerprint)

    @property
    def deadline(self) -> float:
        return self.swim.deadline

    @property
    def fingerprint(self) -> int:
        return self.swim.members.fingerprint.value

    def receive(self, source: Address, message: Message, now: float, arrived_at: float | None = None) -> list[Effect]:
        return self._settled(self.swim.receive(source, message, now, arrived_at))

    def tick(self, now: float) -> list[Effect]:
        return self._settled(self.swim.tick(now))

    def lost(self, node: NodeId, now: float, *, proven: bool = False) -> list[Effect]:
        return self._settled(self.swim.lost(node, now, proven=proven))

    def linked(self, node: NodeId) -> None:
        self.swim.link_made(node)

    def stream_answered(self, seq: int, by: NodeId, now: float) -> list[Effect]:
        return self._settled(self.swim.stream_answered(seq, by, now))

    def tried(self, number: int, refused: bool | None, now: float) -> list[Effect]:
        return self._settled(self.swim.tried(number, refused, now))

    def leave(self, now: float) -> list[Effect]:
        return self.swim.leave(now)

    def set_load(self, load: Load, now: float) -> None:
        self.swim.set_load(load, now)

    def note_load(self, node: NodeId, load: Load, now: float) -> bool:
        """Load heard by another way, in a peer's answer; True when it is newer than what was known."""
        member = self.swim.members.get(node)
        if member is None or not member.live or node == self.me:
            return False
        member.load, member.load_at, member.heard_at = load, now, now
        return True

    def publish(self, facts: Facts, now: float) -> list[Effect]:
        """Raises LocalError when the record is too large."""
        record = self.facts.publish(facts)
        if record is None:
            return []
        return [FactsChanged(self.me), *self._pushes((record,), now, ())]

    def peer(self, node: NodeId) -> Peer | None:
        """The node as the view shows it; None once it was forgotten."""
        member = self.swim.members.get(node)
        if member is None:
            return None
        load, load_at = (self.swim.load, self.swim.load_at) if node == self.me else (member.load, member.load_at)
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
            self.swim.distances.estimate_s(member) if node != self.me else None,
            member.cause,
        )

    # exchanges: ask -> answer -> learn -> answer -> learn

    def ask(self) -> Sync:
        """The opening of an exchange: a digest of everything."""
        return Sync(digest=tuple(self._entry(member) for member in self.swim.members))

    def answer(self, asker: NodeId, sync: Sync, now: float) -> tuple[Synced, list[Effect]]:
        """A peer opened an exchange, brought what we wanted, or pushes news."""
        effects = self._learn(asker, sync.members, sync.records, now, pushed=not sync.digest)
        if not sync.digest or self.swim.left:
            return Synced(self.me), effects
        mine = {entry.node: entry for entry in sync.digest}
        self._hear_verdict_on_me(asker, mine.get(self.me), now)
        effects += self._settled(self.swim.spread(now))
        wanted, members, records = [], [], []
        for node in sorted({*mine, *(member.node for member in self.swim.members)}):
            theirs, member = mine.get(node), self.swim.members.get(node)
            ours = self._entry(member) if member is not None else None
            if theirs is not None and (ours is None or _is_ahead(theirs, ours)):
                wanted.append(node)
            if member is not None and ours is not None and (theirs is None or _is_ahead(ours, theirs)):
                members.append(member.record(now))
                record = self.facts.record(node)
                if record is not None and (theirs is None or _facts_of(ours) > _facts_of(theirs)):
                    records.append(record)
        members, records = _within_budget(members, records)
        return Synced(self.me, tuple(members), tuple(records), tuple(wanted)), effects

    def learn(self, source: Address, synced: Synced, now: float) -> tuple[Sync | None, list[Effect]]:
        """The answer of `source` came: what it brings, and what to send in a second call, if anything is wanted."""
        self.swim.met_seed(source, synced.node)
        effects = self._learn(synced.node, synced.members, synced.records, now, pushed=False)
        if not synced.wanted or self.swim.left:
            return None, effects
        known = [member for node in synced.wanted if (member := self.swim.members.get(node)) is not None]
        records = [record for member in known if (record := self.facts.record(member.node)) is not None]
        kept, records = _within_budget([member.record(now) for member in known], records)
        return Sync(members=tuple(kept), records=tuple(records)), effects

    def farewell(self, now: float) -> Sync:
        """The push that tells a peer we left, for `leave` over a stream."""
        return Sync(members=(self.swim.myself.record(now),))

    def _learn(
        self,
        teller: NodeId,
        members: tuple[MemberRecord, ...],
        records: tuple[FactsRecord, ...],
        now: float,
        *,
        pushed: bool,
    ) -> list[Effect]:
        if self.swim.left:
            return []
        newcomers = sum(member.node not in self.swim.members for member in members)
        for member in members:
            tell = newcomers <= _PASS_ON_MAX or member.node == teller
            self.swim.hear_record(member, now, tell=tell)
        news = [record for record in records if record.owner in self.swim.members and self.facts.accept(record)]
        effects: list[Effect] = [FactsChanged(record.owner) for record in news]
        own_words = [record for record in news if record.owner == teller]
        passed_on = news if pushed or len(news) <= _PASS_ON_MAX else own_words
        # What is held now: of our own record that may be a later one than was told.
        held = [self.facts.record(record.owner) for record in passed_on if self.swim.members[record.owner].live]
        current = tuple(record for record in held if record is not None)
        effects = self._settled(self.swim.spread(now)) + effects
        if current:
            # A teller who was ahead of us about ourselves hears the outcome too; else it knows what it told.
            defended = any(record.owner == self.me for record in current)
            effects += self._pushes(current, now, () if defended else (teller,))
        return effects

    def _hear_verdict_on_me(self, asker: NodeId, entry: DigestEntry | None, now: float) -> None:
        """The asker's digest may call us dead: we refute before we answer, so that the answer sets it right."""
        if entry is not None and SEVERITY[entry.state] > 0:
            self.swim.hear(Suspect(self.me, entry.epoch, entry.incarnation, asker), now)

    def _pushes(self, records: tuple[FactsRecord, ...], now: float, without: tuple[NodeId, ...]) -> list[Effect]:
        # With its member record: news of a newcomer may overtake the datagram that announces it.
        members = tuple(self.swim.members[record.owner].record(now) for record in records)
        sync = Sync(members=members, records=records)
        owners = tuple(record.owner for record in records) if len(records) == 1 else ()
        peers = self.swim.members.some_peers(self.config.push_peers, self.rng, without=(*without, *owners))
        return [Push(peer.address, sync) for peer in peers]

    def _entry(self, member: Member) -> DigestEntry:
        return DigestEntry(member.node, member.epoch, member.incarnation, member.state, *self.facts.version(member.node))

    def _settled(self, effects: list[Effect]) -> list[Effect]:
        """Lets the facts book follow what happened to the members."""
        for effect in list(effects):
            match effect:
                case MemberForgotten(node=node):
                    self.facts.forget(node)
                case Renewed(epoch=epoch):
                    if (record := self.facts.renew(epoch)) is not None:
                        effects = [*effects, FactsChanged(self.me), *self._pushes((record,), 0.0, ())]
        return effects


def _facts_of(entry: DigestEntry) -> tuple[int, int]:
    return entry.facts_epoch, entry.facts_version


def _is_ahead(one: DigestEntry, other: DigestEntry) -> bool:
    """Does the first know something of the node that the second does not?"""
    standing = (one.epoch, one.incarnation, SEVERITY[one.state])
    return standing > (other.epoch, other.incarnation, SEVERITY[other.state]) or _facts_of(one) > _facts_of(other)


def _within_budget(members: list[MemberRecord], records: list[FactsRecord]) -> tuple[list[MemberRecord], list[FactsRecord]]:
    """What of both fits one sync, members first; the next exchange brings the rest."""
    members = members[: _REPLY_BYTES // _RECORD_BYTES]
    left_bytes = _REPLY_BYTES - len(members) * _RECORD_BYTES
    kept = []
    for record in records:
        left_bytes -= len(record.body) + 64
        if left_bytes < 0:
            break
        kept.append(record)
    return members, kept
