"""How what is said changes what is known: the half of SWIM that judges claims.

A node's own words count only with its signature. Words of others about it, that it is silent or gone, count against the last
it was heard to say itself and no further: nobody can push its incarnation up, and its next word beats them all.
All changes of a member go through `_become`; what is news is kept for `spread`, what changed for `take_changes`.
A claim that loses to what is known earns its teller a correction, so a stale rumour meets the newer one at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from membership.core.claim_verifier import ClaimVerifier, is_news, within_words
from membership.core.config import MembershipConfig
from membership.core.dissemination import Rumours, transmit_limit
from membership.core.distances import Distances
from membership.core.effects import Effect, MemberChanged, MemberForgotten, SendDatagram, StartSync
from membership.core.exchanges import Exchanges
from membership.core.health import LAG_MAX_S, LocalHealth
from membership.core.members import Member, Members, description_of, standing_of, state_of
from membership.core.regions import some_to_tell
from membership.core.self_claims import SelfClaimProcessing
from membership.core.suspicion import Suspicion, expected_confirmations, minimum_s
from membership.facts.fingerprint import Fingerprint
from mesh.ids import Address, NodeId
from mesh.keys.signing import Signer
from mesh.view import Load, PeerState
from mesh.wire.datagram_codec import claim_budget_bytes
from mesh.wire.gossip import (
    LISTENS,
    REFUSED,
    TIMEOUT,
    ZERO_LOAD,
    Alive,
    Claim,
    Dead,
    Gossip,
    Left,
    Message,
    Sender,
    Suspect,
)
from mesh.wire.sync import MemberRecord

if TYPE_CHECKING:
    from random import Random

WAY_FACTOR = 3.0  # a probe waits for so many of the round trips that are to be expected
_FRESH_S = 5.0  # a refused death is believed at once up to this age: later its victim may well be back


class ClaimProcessing(SelfClaimProcessing):
    """What one node knows of the members, and what it still has to tell."""

    def __init__(
        self, me: Alive, signer: Signer, config: MembershipConfig, rng: Random, now: float, fingerprint: Fingerprint
    ) -> None:
        self.me: NodeId = me.node
        self.words = ClaimVerifier(signer)
        self.config = config
        self.rng = rng
        self.left = False
        self.rumours = Rumours()
        self.myself = Member(me.node, description_of(me), me.epoch, me.incarnation, PeerState.ALIVE, now)
        self.myself.key, self.myself.signature = self.words.key, self.words.signed(me).signature
        self.behind = False  # somebody spoke of words of a node that were not heard here
        self.members = Members(self.myself, fingerprint)
        self.load, self.load_at = ZERO_LOAD, now
        self.health = LocalHealth()
        self.distances = Distances(rng)
        self.linked: dict[NodeId, int] = {}  # links open with each peer, either way
        self.doubted: list[NodeId] = []  # heard to be refused-dead, but linked with us: to be looked at
        self.unknown_claims = self.refused_newcomers = 0
        self._news: dict[NodeId, Claim] = {}
        self._changes: list[Effect] = []
        self._exchanges = Exchanges(config, now)
        self.next_gossip_at = now
        self._begin_hearing_of_self(me, now)

    def set_load(self, load: Load, now: float) -> None:
        """This node's own load, told on every message from here on."""
        self.load, self.load_at = load, now

    def sender(self, now: float) -> Sender:
        age_ms = max(0, round((now - self.load_at) * 1000))
        lag_ms = round(self.health.lag_s(now) * 1000)
        me, fingerprint = self.myself, self.members.fingerprint.value
        return Sender(self.me, me.epoch, me.incarnation, fingerprint, self.load, age_ms, lag_ms)

    def suspected(self) -> list[Member]:
        return [self.members[node] for node in sorted(self.members.suspects)] if self.members.suspects else []

    def on_newcomer(self, node: NodeId) -> None:
        """A member came to life; probing gives it a place in its round."""

    def filled(self, bare: Message, first: Sequence[Claim]) -> Message:
        """`bare` with `first` and as many rumours as fit the datagram."""
        if not first and not self.rumours.by_node:
            return bare
        limit = transmit_limit(self.config.transmit_multiplier, self.members.live_count)
        claims = self.rumours.take(claim_budget_bytes(bare), limit, first)
        return msgspec.structs.replace(bare, claims=claims)

    def spread(self, now: float, without: tuple[NodeId, ...] = ()) -> list[Effect]:
        """Ends every call from outside: changes, and this call's news to a few peers at once."""
        effects = self.take_changes()
        if effects:
            self._exchanges.note(self.members.fingerprint.value, now)
        if self._news:
            news, self._news = self._news, {}
            if self.next_gossip_at <= now:  # there was nothing to tell until now
                self.next_gossip_at = now + self.config.gossip_period_s
            bare = Gossip(self.sender(now))
            claims = Rumours().take(claim_budget_bytes(bare), 1, list(news.values()))
            for peer in some_to_tell(self.members, self.config.eager_peers, self.rng, without):
                effects.append(SendDatagram(self.members.address_of(peer), Gossip(bare.sender, claims)))
        return effects

    def forget(self, member: Member) -> None:
        """All that is known of one that is gone."""
        self.members.forget(member.node)
        self.distances.forget(member)
        self.rumours.forget(member.node)
        self._changes.append(MemberForgotten(member.node))

    def note_change(self, change: MemberChanged) -> None:
        self._changes.append(change)

    def take_changes(self) -> list[Effect]:
        changes, self._changes = self._changes, []
        return changes

    def want_exchange(self, address: Address, now: float) -> bool:
        """Asks for an exchange, unless this peer, or this node, had one a moment ago."""
        if not self._exchanges.take(address, now):
            return False
        self._changes.append(StartSync(address))
        return True

    def compare(self, fingerprint: int, address: Address, now: float) -> None:
        """A peer's fingerprint, and where it can be asked. A difference is settled by an exchange, unless by rumours soon."""
        mine = self.members.fingerprint.value
        self._exchanges.note(mine, now)
        if fingerprint != mine and self._exchanges.settled(self.members.live_count, now):
            self.want_exchange(address, now)

    def declare(self, claim: Claim, now: float) -> None:
        """A verdict of this node itself."""
        member = self.members[claim.node]
        if isinstance(claim, Suspect) and member.state is PeerState.SUSPECT:
            self._confirm(member, claim)
        elif standing_of(claim) > member.standing:
            self._become(member, claim, now, by=self.me)
            self._tell(claim)

    def hear_all(self, source: Address, claims: Sequence[Claim], now: float) -> list[Claim]:
        """Takes in what one datagram tells; returns what its sender should hear in answer, if it is behind.

        No honest node passes forged words on, so the first ends the datagram: to judge more of them would only cost time.
        """
        answers: list[Claim] = []
        forged, self.behind = self.words.forged, False
        for claim in claims:
            answers += self.hear(claim, now)
            if self.words.forged != forged:
                break
        if self.behind:
            self.want_exchange(source, now)
        return answers

    def hear(self, claim: Claim, now: float, words: Alive | Left | None = None) -> list[Claim]:
        """Takes one claim in; returns what its teller should hear in answer, if it is behind.

        `words`: what the node itself last said, where that comes along with somebody's verdict.
        """
        words = claim if isinstance(claim, Alive | Left) else words
        if claim.node == self.me:
            return self._hear_of_myself(claim, words, now)
        member = self.members.get(claim.node)
        if member is None:
            if isinstance(claim, Alive) and claim.key:
                self._admit(claim, PeerState.ALIVE, claim, claim.key, now, tell=True)
            else:
                self.unknown_claims += 1  # nothing to undo here; the next exchange brings it with its address and key
                self.behind |= isinstance(claim, Alive)
            return []
        described = False
        if words is not None and is_news(words, member):
            if not self.words.hold(words, member.key):
                return []
            described = self._take_words(member, words)
        aimed, claim = claim, within_words(claim, member, words)
        self.behind |= claim is not aimed
        told, known = standing_of(claim), member.standing
        if isinstance(claim, Dead) and member.live and told > known:
            return self._hear_of_death(member, claim, now)
        if told > known:
            self._become(member, claim, now, by=claim.by if isinstance(claim, Suspect) else self.me)
            self._tell(claim)
            if isinstance(claim, Suspect):
                self._note_listening(member, claim)
            return []
        if described:
            self._changes.append(MemberChanged(member.node, member.state, member.state))
        if isinstance(claim, Suspect) and told == known:
            self._confirm(member, claim)
            self._note_listening(member, claim)
        return [member.claim(self.me)] if told < known else []

    def _take_words(self, member: Member, words: Alive | Left) -> bool:
        """Whether they describe the node anew. Its state is another matter: they may have come late."""
        if isinstance(words, Left):
            member.signature = words.signature
            return False
        if member.state is not PeerState.LEFT or standing_of(words) > member.standing:
            member.signature = words.signature
        if member.address != words.address:
            self.distances.forget(member)
        moved = member.region != words.region
        member.description = description_of(words)
        if moved:
            self.members.put(member)
        return True

    def hear_record(self, record: MemberRecord, now: float, *, tell: bool) -> None:
        """Takes in what a peer's exchange says of one node. `tell`: pass a newcomer on as a rumour."""
        claim, words = self._claim_in(record), record.words
        if record.node != self.me and record.node not in self.members:
            self._admit(record, record.state, words, record.key, now, tell=tell)
            if (newcomer := self.members.get(record.node)) is not None:
                self.distances.heard(newcomer, record.where)
        else:
            self.hear(claim, now, words)

    def _claim_in(self, record: MemberRecord) -> Claim:
        """The record as a claim. Its accuser is unknown, so it is the node itself: no independent confirmation."""
        node, epoch, incarnation = record.node, record.epoch, record.incarnation
        match record.state:
            case PeerState.SUSPECT:
                return Suspect(node, epoch, incarnation, node, listens=record.cause == LISTENS)
            case PeerState.DEAD:
                return Dead(node, epoch, incarnation, node, (record.age_s <= _FRESH_S and record.cause) or TIMEOUT)
            case _:
                return record.words

    def _admit(
        self, claim: Alive | MemberRecord, state: PeerState, words: Alive | Left, key: bytes, now: float, *, tell: bool
    ) -> None:
        if len(self.members) >= self.config.members_max:
            tombstone = self.members.oldest_tombstone()
            if tombstone is None or state not in (PeerState.ALIVE, PeerState.SUSPECT):
                self.refused_newcomers += 1
                return
            self.forget(self.members[tombstone])
        since = now - claim.age_s if isinstance(claim, MemberRecord) else now
        if now - since > self.config.forget_s and state in (PeerState.DEAD, PeerState.LEFT):
            return  # a ghost: we may have forgotten it already
        if not self.words.hold(words, key):
            return
        member = Member(claim.node, description_of(claim), claim.epoch, claim.incarnation, state, since)
        member.key, member.signature = key, words.signature
        if state is PeerState.SUSPECT:
            member.since, member.suspicion = now, self._suspicion(claim.node, claim.node, now)
        member.cause = claim.cause if isinstance(claim, MemberRecord) and state is PeerState.DEAD else ""
        self.members.put(member)
        self._changes.append(MemberChanged(claim.node, None, state))
        if member.live:
            self.on_newcomer(member.node)
            if tell:
                self._tell(member.alive_claim())

    def _become(self, member: Member, claim: Claim, now: float, by: NodeId) -> None:
        """The one door through which a known member changes."""
        before, state = member.state, state_of(claim)
        restarted = claim.epoch > member.epoch
        member.epoch, member.incarnation = claim.epoch, claim.incarnation
        if state is not before or restarted:
            member.since = now
        if restarted:
            self.distances.forget(member)
        member.state = state
        member.cause = (REFUSED if claim.cause == REFUSED else TIMEOUT) if isinstance(claim, Dead) else ""
        member.suspicion = self._suspicion(member.node, by, now) if state is PeerState.SUSPECT else None
        self.members.put(member)
        if member.live and before not in (PeerState.ALIVE, PeerState.SUSPECT):
            self.on_newcomer(member.node)
        self._changes.append(MemberChanged(member.node, before, state, restarted))

    def _confirm(self, member: Member, claim: Suspect) -> None:
        if member.suspicion is not None and claim.by != member.node and member.suspicion.confirm((claim.by,)):
            listens = member.suspicion.listens
            self._tell(Suspect(claim.node, claim.epoch, claim.incarnation, claim.by, listens or claim.listens))

    def _note_listening(self, member: Member, claim: Suspect) -> None:
        """Its process exists, says somebody who could connect to it: silence alone will not kill it soon."""
        if claim.listens and member.suspicion is not None and not member.suspicion.listens:
            member.suspicion.listens = True
            self._tell(claim)

    def _suspicion(self, node: NodeId, by: NodeId, now: float) -> Suspicion:
        live = self.members.live_count
        min_s = minimum_s(self.config.suspicion_multiplier, live, self.config.suspicion_unit_s)
        expected = expected_confirmations(self.config.confirmations, live)
        first = None if by == node else by
        slack_s = self.slack_s(self.members.get(node), now)
        max_s = min_s * self.config.suspicion_max_factor
        return Suspicion(now, expected, min_s, max_s, first, slack_s=2 * slack_s, stall_patience_s=self.config.stall_patience_s)

    def slack_s(self, member: Member | None, now: float) -> float:
        """How much longer than usual an answer of `member` may take: its lag, ours, and a way longer than the usual ones."""
        if member is None:
            return min(LAG_MAX_S, self.health.lag_s(now))
        far_s = max(0.0, WAY_FACTOR * self.distances.expected_s(member) - self.config.probe_timeout_s)
        return min(LAG_MAX_S, self.health.lag_s(now) + member.lag_s + far_s)

    def _hear_of_death(self, member: Member, claim: Dead, now: float) -> list[Claim]:
        """A refused death is proven, and news only while it is fresh: whoever has no link with the dead believes it at once.

        Other hearsay kills only whom we have suspected ourselves for a while; anybody else gets time to speak up.

        So two halves of a mesh that took each other for dead meet without a single death. In an ordinary death
        the suspicion went round seconds before the verdict, and costs nothing here.
        """
        if claim.cause == REFUSED and member.node not in self.linked:
            self._become(member, claim, now, by=claim.by)
            self._tell(claim)
            return []
        if claim.cause == REFUSED:
            self.doubted.append(member.node)
        if (claim.epoch, claim.incarnation) > (member.epoch, member.incarnation) or member.suspicion is None:
            suspect = Suspect(claim.node, claim.epoch, claim.incarnation, claim.by)
            self._become(member, suspect, now, by=claim.by)
            self._tell(suspect)
        suspicion = member.suspicion
        assert suspicion is not None, "a suspect has a suspicion"
        if suspicion.listens and not suspicion.stalled:
            return []  # the verdict of one who did not know
        suspicion.stalled = suspicion.listens = False
        suspicion.cap_s = suspicion.min_s / 2  # when it is over, a tick says so, which alone knows whether we slept meanwhile
        return []
