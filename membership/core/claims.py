"""Claim processing: how claims change what is known of the members (the half of SWIM that judges).

A node's own claim counts only with its signature. An accusation by others counts against the last claim of its own that is
known and no further: no member can push another's incarnation up, and the accused's next claim overrides all accusations.
All changes of a known member go through `_become`. A claim that loses to what is known earns its sender a correction.
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

_FRESH_S = 5.0  # a refused death is believed at once up to this age: later its victim may well be back


class ClaimProcessing:
    """Applies claims of datagrams, of exchanges and of this node itself to `state`."""

    def __init__(self, state: NodeState, refutation: Refutation, on_newcomer: Callable[[NodeId], None]) -> None:
        """`on_newcomer` is called when a member comes to life: probing gives it a place in its round."""
        self._state = state
        self._refutation = refutation
        self._on_newcomer = on_newcomer
        self.doubted: list[NodeId] = []  # reported refused-dead, but linked with this node, which has to check
        self.unknown_claims = 0  # about nodes that are not known here
        self.refused_newcomers = 0  # for want of room in the member table

    def declare(self, claim: Claim, now: float) -> None:
        """A verdict of this node itself."""
        member = self._state.members[claim.node]
        if isinstance(claim, Suspect) and member.state is PeerState.SUSPECT:
            self._confirm(member, claim)
        elif standing_of(claim) > member.standing:
            self._become(member, claim, now, by=self._state.me)
            self._state.queue_claim(claim)

    def apply_all(self, source: Address, claims: Sequence[Claim], now: float) -> list[Claim]:
        """Takes in the claims of one datagram; returns the corrections for its sender, if it is behind.

        No honest node passes forged claims on, so the first one ends the datagram: to judge more would only cost time.
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
        """Takes in one claim; returns the correction for its sender, if it is behind.

        `own`: the last claim of the node itself, where it comes along with another node's verdict.
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
                self.unknown_claims += 1  # nothing to undo here; the next exchange brings the node with its address and key
                state.behind |= isinstance(claim, Alive)
            return []
        described = False
        if own is not None and is_news(own, member):
            if not state.verifier.verifies(own, member.key):
                return []
            described = self._take_own(member, own)
        # An accusation beyond the accused's own claims is cut down to them; that it was higher shows that we are behind.
        aimed, claim = claim, limited_to_own(claim, member, own)
        state.behind |= claim is not aimed
        claimed, recorded = standing_of(claim), member.standing
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
        if isinstance(claim, Suspect) and claimed == recorded:
            self._confirm(member, claim)
            self.note_listening(member, claim)
        return [member.claim(state.me)] if claimed < recorded else []

    def apply_record(self, record: MemberRecord, now: float, *, pass_on: bool) -> None:
        """Takes in what a peer's exchange contains about one node. `pass_on`: pass a newcomer on as a rumour."""
        state, own = self._state, record.words
        if record.node != state.me and record.node not in state.members:
            self._admit(record, record.state, own, record.key, now, pass_on=pass_on)
            if (newcomer := state.members.get(record.node)) is not None:
                state.distances.store_point(newcomer, record.where)
        else:
            self.apply(_claim_in(record), now, own)

    def note_listening(self, member: Member, claim: Suspect) -> None:
        """A node could connect to the suspect's process: silence alone will not kill it soon."""
        if claim.listens and member.suspicion is not None and not member.suspicion.listens:
            member.suspicion.listens = True
            self._state.queue_claim(claim)

    def _take_own(self, member: Member, own: Alive | Left) -> bool:
        """Stores a member's own newer claim; whether it describes the member anew. The state may still be a later one."""
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
        """Makes an unknown node a member, if there is room, its own claim is authentic, and it is not a ghost."""
        ours = self._state
        if len(ours.members) >= ours.config.members_max:
            tombstone = ours.members.oldest_tombstone()
            if tombstone is None or state not in (PeerState.ALIVE, PeerState.SUSPECT):
                self.refused_newcomers += 1
                return
            ours.forget(ours.members[tombstone])
        since = now - claim.age_s if isinstance(claim, MemberRecord) else now
        if now - since > ours.config.forget_s and state in (PeerState.DEAD, PeerState.LEFT):
            return  # a ghost: we may have forgotten it already
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
        """Changes a known member to what `claim` says: every change of one goes through here."""
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
        """One more accuser shortens the suspicion; `by` equal to the accused stands for no accuser."""
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
        """A refused death is proven, and news only while it is fresh: a node without a link to the dead believes it at once.

        Other hearsay kills only members that this node has suspected for a while itself; any other member gets time to
        refute. So two halves of a mesh that took each other for dead meet without a single death. In an ordinary death the
        suspicion went round seconds before the verdict, and costs nothing here.
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
            return  # the verdict of a node that did not know that the process still listens
        suspicion.stalled = suspicion.listens = False
        suspicion.cap_s = suspicion.min_s / 2  # a tick ends it, which alone knows whether this process slept meanwhile


def _claim_in(record: MemberRecord) -> Claim:
    """The record as a claim. Its accuser is unknown, so the node itself stands for it: no independent confirmation."""
    node, epoch, incarnation = record.node, record.epoch, record.incarnation
    match record.state:
        case PeerState.SUSPECT:
            return Suspect(node, epoch, incarnation, node, listens=record.cause == LISTENS)
        case PeerState.DEAD:
            return Dead(node, epoch, incarnation, node, (record.age_s <= _FRESH_S and record.cause) or TIMEOUT)
        case _:
            return record.words
