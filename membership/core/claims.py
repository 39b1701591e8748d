"""Claim processing: how claims change the records of members (the half of SWIM that decides about states).

A node's own claim counts only with its signature. An accusation by another node counts at most against the accused's latest own
claim: no member can raise another's incarnation, and the accused's next claim overrides all accusations.
All state changes of a member go through `_become`. A claim that is older than the record draws a correction for its sender.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from membership.core.claim_verifier import is_news, limited_to_own
from membership.core.effects import MemberChanged
from membership.core.members import Member, description_of, standing_of, state_of
from membership.core.node_state import NodeState
from membership.core.refutation import Refutation
from membership.core.suspicion import Suspicion, expected_confirmations, minimum_s
from mesh.ids import Address, NodeId
from mesh.view import PeerState
from mesh.wire.gossip import LISTENS, REFUSED, TIMEOUT, Alive, Claim, Dead, Left, Suspect
from mesh.wire.sync import MemberRecord

_FRESH_S = 5.0  # a refused death is accepted at once up to this age: later the member may have restarted


class ClaimProcessing:
    """Applies claims of datagrams, of exchanges and of this node itself to `state`."""

    def __init__(self, state: NodeState, refutation: Refutation, on_newcomer: Callable[[NodeId], None]) -> None:
        """`on_newcomer` is called when a member becomes live: probing adds it to its round."""
        self._state = state
        self._refutation = refutation
        self._on_newcomer = on_newcomer
        self.doubted: list[NodeId] = []  # reported dead with a refused port, but linked with this node, which has to check
        self.unknown_claims = 0  # about nodes that are not known here
        self.refused_newcomers = 0  # because the member table was full

    def declare(self, claim: Claim, now: float) -> None:
        """Applies a verdict of this node's own failure detector, and queues it for the others."""
        member = self._state.members[claim.node]
        if isinstance(claim, Suspect) and member.state is PeerState.SUSPECT:
            self._confirm(member, claim)
        elif standing_of(claim) > member.standing:
            self._become(member, claim, now, by=self._state.me)
            self._state.queue_claim(claim)

    def apply_all(self, source: Address, claims: Sequence[Claim], now: float) -> list[Claim]:
        """Applies the claims of one datagram; returns the corrections for its sender, if it is behind.

        An honest node passes no forged claims on, so the first one ends the datagram: to verify more would only cost time.
        """
        corrections: list[Claim] = []
        state = self._state
        forged, state.behind = state.verifier.forged, False
        for claim in claims:
            corrections += self.apply(claim, now)
            if state.verifier.forged != forged:
                break
        if state.behind:
            state.request_exchange(source, now)
        return corrections

    def apply(self, claim: Claim, now: float, own: Alive | Left | None = None) -> list[Claim]:
        """Applies one claim; returns the correction for its sender, if it is behind.

        `own`: the latest claim of the node itself, where a record carries it with another node's verdict.
        """
        state = self._state
        own = claim if isinstance(claim, Alive | Left) else own
        if claim.node == state.me:
            return self._refutation.apply(claim, own, now)
        member = state.members.get(claim.node)
        if member is None:
            if isinstance(claim, Alive) and claim.key:
                self._admit(claim, PeerState.ALIVE, claim, claim.key, now, pass_on=True)
            else:
                self.unknown_claims += 1  # dropped: the next exchange brings the node with its address and key
                state.behind |= isinstance(claim, Alive)
            return []
        # First the member's own claim: it decides how far an accusation may reach.
        described = False
        if own is not None and is_news(own, member):
            if not state.verifier.verifies(own, member.key):
                return []
            described = self._take_own(member, own)
        # An accusation beyond the accused's own claims is limited to them; a higher count means that one is missing here.
        received, claim = claim, limited_to_own(claim, member, own)
        state.behind |= claim is not received
        assert claim.node == member.node, "a limited claim is about the same member"
        claimed, recorded = standing_of(claim), member.standing
        # A death reported by another node does not apply directly: the member gets time to refute it.
        if isinstance(claim, Dead) and member.live and claimed > recorded:
            self._apply_reported_death(member, claim, now)
            return []
        if claimed > recorded:
            self._become(member, claim, now, by=claim.by if isinstance(claim, Suspect) else state.me)
            state.queue_claim(claim)
            if isinstance(claim, Suspect):
                self.note_listening(member, claim)
            return []
        if described:
            state.note(MemberChanged(member.node, member.state, member.state))
        # The same accusation again may come from another accuser: an independent confirmation.
        if isinstance(claim, Suspect) and claimed == recorded:
            self._confirm(member, claim)
            self.note_listening(member, claim)
        return [member.claim(state.me)] if claimed < recorded else []

    def apply_record(self, record: MemberRecord, now: float, *, pass_on: bool) -> None:
        """Applies the record of one node from a peer's exchange. `pass_on`: queues a newcomer as a rumour."""
        state, own = self._state, record.own_claim
        if record.node != state.me and record.node not in state.members:
            self._admit(record, record.state, own, record.key, now, pass_on=pass_on)
            if (newcomer := state.members.get(record.node)) is not None:
                state.distances.store_point(newcomer, record.where)
        else:
            self.apply(_claim_in(record), now, own)

    def note_listening(self, member: Member, claim: Suspect) -> None:
        """Records that a node could connect to the suspect's process: silence alone will not end in its death soon."""
        if claim.listens and member.suspicion is not None and not member.suspicion.listens:
            member.suspicion.listens = True
            self._state.queue_claim(claim)

    def _take_own(self, member: Member, own: Alive | Left) -> bool:
        """Stores a member's own newer claim; returns whether its description changed. The recorded state may be newer."""
        if isinstance(own, Left):
            member.signature = own.signature
            return False
        if member.state is not PeerState.LEFT or standing_of(own) > member.standing:
            member.signature = own.signature
        if member.address != own.address:
            self._state.distances.forget(member)
        moved = member.region != own.region
        member.description = description_of(own)
        if moved:
            self._state.members.put(member)
        return True

    def _admit(
        self, claim: Alive | MemberRecord, state: PeerState, own: Alive | Left, key: bytes, now: float, *, pass_on: bool
    ) -> None:
        """Adds a node to the member table if there is room, its own claim is authentic, and its record has not expired."""
        ours = self._state
        if len(ours.members) >= ours.config.members_max:
            tombstone = ours.members.oldest_tombstone()
            if tombstone is None or state not in (PeerState.ALIVE, PeerState.SUSPECT):
                self.refused_newcomers += 1
                return
            ours.forget(ours.members[tombstone])
        since = now - claim.age_s if isinstance(claim, MemberRecord) else now
        if now - since > ours.config.forget_s and state in (PeerState.DEAD, PeerState.LEFT):
            return  # expired: this node may have dropped the same tombstone already
        if not ours.verifier.verifies(own, key):
            return
        member = Member(claim.node, description_of(claim), claim.epoch, claim.incarnation, state, since)
        member.key, member.signature = key, own.signature
        if state is PeerState.SUSPECT:
            member.since, member.suspicion = now, self._suspicion(claim.node, claim.node, now)
        member.cause = claim.cause if isinstance(claim, MemberRecord) and state is PeerState.DEAD else ""
        ours.members.put(member)
        ours.note(MemberChanged(claim.node, None, state))
        if member.live:
            self._on_newcomer(member.node)
            if pass_on:
                ours.queue_claim(member.alive_claim())

    def _become(self, member: Member, claim: Claim, now: float, by: NodeId) -> None:
        """Changes a member's state to that of `claim`. All state changes of members go through here."""
        assert standing_of(claim) > member.standing, "a member's standing never goes back"
        before, state = member.state, state_of(claim)
        restarted = claim.epoch > member.epoch
        member.epoch, member.incarnation = claim.epoch, claim.incarnation
        if state is not before or restarted:
            member.since = now
        if restarted:
            self._state.distances.forget(member)
        member.state = state
        member.cause = (REFUSED if claim.cause == REFUSED else TIMEOUT) if isinstance(claim, Dead) else ""
        member.suspicion = self._suspicion(member.node, by, now) if state is PeerState.SUSPECT else None
        self._state.members.put(member)
        if member.live and before not in (PeerState.ALIVE, PeerState.SUSPECT):
            self._on_newcomer(member.node)
        self._state.note(MemberChanged(member.node, before, state, restarted))
        assert (member.suspicion is not None) == (member.state is PeerState.SUSPECT), "suspects alone have a suspicion"

    def _confirm(self, member: Member, claim: Suspect) -> None:
        """Counts one more accuser, which shortens the suspicion; `by` equal to the accused stands for an unknown accuser."""
        if member.suspicion is not None and claim.by != member.node and member.suspicion.confirm((claim.by,)):
            listens = member.suspicion.listens
            self._state.queue_claim(Suspect(claim.node, claim.epoch, claim.incarnation, claim.by, listens or claim.listens))

    def _suspicion(self, node: NodeId, by: NodeId, now: float) -> Suspicion:
        config, live = self._state.config, self._state.members.live_count
        min_s = minimum_s(config.suspicion_multiplier, live, config.suspicion_unit_s)
        expected = expected_confirmations(config.confirmations, live)
        first = None if by == node else by
        slack_s = self._state.slack_s(self._state.members.get(node), now)
        max_s = min_s * config.suspicion_max_factor
        return Suspicion(now, expected, min_s, max_s, first, slack_s=2 * slack_s, stall_patience_s=config.stall_patience_s)

    def _apply_reported_death(self, member: Member, claim: Dead, now: float) -> None:
        """Applies another node's report of a death. A death with a refused port is accepted at once without a link to the member.

        Any other report ends only suspicions that have run here for a while; a member that is not suspected here becomes
        suspect and gets time to refute. So two halves of a mesh that declared each other dead merge without a death. In an
        ordinary death the suspicion was spread seconds before the verdict, so this rule costs no time.
        """
        if claim.cause == REFUSED and member.node not in self._state.linked:
            self._become(member, claim, now, by=claim.by)
            self._state.queue_claim(claim)
            return
        if claim.cause == REFUSED:
            self.doubted.append(member.node)
        if (claim.epoch, claim.incarnation) > (member.epoch, member.incarnation) or member.suspicion is None:
            suspect = Suspect(claim.node, claim.epoch, claim.incarnation, claim.by)
            self._become(member, suspect, now, by=claim.by)
            self._state.queue_claim(suspect)
        suspicion = member.suspicion
        assert suspicion is not None, "a suspect has a suspicion"
        if suspicion.listens and not suspicion.stalled:
            return  # the reporting node had no evidence that the process still listens; this node has
        suspicion.stalled = suspicion.listens = False
        suspicion.cap_s = suspicion.min_s / 2  # `tick` ends it, because only `tick` detects that this process was suspended


def _claim_in(record: MemberRecord) -> Claim:
    """Converts a record to a claim. Its accuser is unknown, so the node itself is named, which confirms nothing."""
    node, epoch, incarnation = record.node, record.epoch, record.incarnation
    match record.state:
        case PeerState.SUSPECT:
            return Suspect(node, epoch, incarnation, node, listens=record.cause == LISTENS)
        case PeerState.DEAD:
            return Dead(node, epoch, incarnation, node, (record.age_s <= _FRESH_S and record.cause) or TIMEOUT)
        case _:
            return record.own_claim
