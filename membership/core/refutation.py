"""Refutation: what a node does with claims about itself (SWIM, section 4.2).

It answers an accusation with a higher incarnation. A claim that is signed with its own key and that this run never made comes
from a former run whose epoch was lost, or from a live twin (`membership.core.twins`): until that is decided, nothing is refuted.
"""

from __future__ import annotations

from typing import TypeGuard

from membership.core.effects import EpochRenewed, MemberChanged, MembershipEffect, ProcessDisplaced
from membership.core.members import description_of
from membership.core.node_state import NodeState
from membership.core.twins import Twins
from mesh.ids import Address
from mesh.view import PeerState
from mesh.wire.gossip import Alive, Claim, Left
from mesh.wire.twin import ProcessRun, TwinAnswer

MAX_COUNTER = 2**48 - 1  # one less than the wire's bound, so that a refutation of anything accepted still fits


class Refutation:
    """Refutes accusations of this node, and starts the search for twins. `state`: of the same node."""

    def __init__(self, state: NodeState, me: Alive, now: float) -> None:
        self._state = state
        self.twins = Twins(me, now)
        self.refutations = 0  # since the start
        self.conflicts = 0  # claims in this node's name that this run did not make, or that leave no room for a refutation
        self._held: Alive | None = None  # a claim of another run, until it is decided whether that process lives
        self._last_renewal_at = -1e9

    def asked(self, by: ProcessRun, now: float) -> tuple[TwinAnswer, list[MembershipEffect]]:
        """Answers a process that claims this node's identity and asks for this process's run."""
        answer, effects = self.twins.asked(by, now)
        return answer, [] if self._state.left else effects

    def found(self, place: Address, answer: TwinAnswer | None, now: float) -> list[MembershipEffect]:
        """Applies the outcome of a `FindTwin`. A displaced process sends no Left claim: it would be taken for the other's."""
        if self._state.left:
            return []
        effects = self.twins.found(place, answer, now)
        held, self._held = self._held, None
        if any(isinstance(effect, ProcessDisplaced) for effect in effects):
            self._state.left = True
        elif held is not None:
            self.apply(held, held, now)
        return effects

    def apply(self, claim: Claim, own: Alive | Left | None, now: float) -> list[Claim]:
        """Applies a claim about this node; returns the corrections for its sender.

        `own`: the claim signed with this node's key that was received with it, if any.
        """
        state, me = self._state, self._state.myself
        claimed, mine = (claim.epoch, claim.incarnation), (me.epoch, me.incarnation)
        if claimed < mine:
            if not isinstance(claim, Alive):
                state.queue_claim(me.alive_claim())  # a stale accusation is still spreading, so its refutation must spread too
            return [me.alive_claim()]
        if claimed > mine and (own is None or (own.epoch, own.incarnation) != claimed):
            # The accusation is above every own claim known here: an exchange with its sender brings that claim.
            state.behind = True
            return [me.alive_claim()]
        # From here on the claim is at our own count, or comes with an own claim at its count, which must be authentic.
        if (claimed > mine or isinstance(claim, Left)) and not (own and state.verifier.verifies(own, state.verifier.key)):
            return []
        if isinstance(claim, Alive):
            if claimed == mine and description_of(claim) == me.description:
                return []
            if claimed == mine and not state.verifier.verifies(claim, state.verifier.key):
                return []
            # Another run of this node: the epoch file was lost, or the data directory was copied.
            self.conflicts += 1
        if self._is_of_another_run(own) and not self._goes_beyond(own, now):
            return []
        if isinstance(claim, Alive):
            if now - self._last_renewal_at < state.config.probe_period_s:
                return []  # two twins would otherwise raise their epochs as fast as the network allows
            self._last_renewal_at = now
        if claim.epoch >= MAX_COUNTER or claim.incarnation >= MAX_COUNTER:
            self.conflicts += 1
            return []
        assert (claim.epoch, claim.incarnation) >= mine, "only claims at this run's count or above it are refuted"
        return [self._refuted(claim)]

    def _refuted(self, claim: Claim) -> Alive:
        """Raises this node's incarnation, or its epoch, above the claim's, and queues the new claim."""
        state, me = self._state, self._state.myself
        before = me.epoch, me.incarnation
        self.refutations += 1
        state.health.note(+1)  # a node that is suspected often may be slow itself (Lifeguard)
        if claim.epoch > me.epoch:
            me.epoch, me.incarnation = claim.epoch + 1, 0
            state.note(EpochRenewed(me.epoch))
        else:
            me.incarnation = claim.incarnation + 1
        assert before < (me.epoch, me.incarnation) > (claim.epoch, claim.incarnation), "a refutation is above what it refutes"
        me.description = (me.epoch, me.incarnation, *me.description[2:])
        me.signature = state.verifier.signed(me.alive_claim()).signature
        state.members.put(me)
        state.note(MemberChanged(state.me, PeerState.ALIVE, PeerState.ALIVE))
        state.queue_claim(me.alive_claim())
        return me.alive_claim()

    def _is_of_another_run(self, own: Alive | Left | None) -> TypeGuard[Alive]:
        """Returns whether `own` is authentic, at or above this run's count, and not made by this run."""
        state, me = self._state, self._state.myself
        return (
            isinstance(own, Alive)
            and (own.epoch, own.incarnation) >= (me.epoch, me.incarnation)
            and description_of(own) != me.description
            and state.verifier.verifies(own, state.verifier.key)
        )

    def _goes_beyond(self, own: Alive, now: float) -> bool:
        """Returns whether to refute this claim now; else it is held until it is decided which process made it."""
        beyond, effects = self.twins.own_claim_received(own.address, now)
        for effect in effects:
            self._state.note(effect)
        self._held = None if beyond else own
        return beyond
