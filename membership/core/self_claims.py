"""What a node does with claims about itself: it refutes accusations, and goes beyond words of its own that it never said.

Such words are of a former run whose count was lost, or of a live twin (`membership.core.twins`): while that is open nothing is
said against them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from membership.core.claim_verifier import ClaimVerifier
from membership.core.config import MembershipConfig
from membership.core.effects import Effect, EpochRenewed, MemberChanged, ProcessDisplaced
from membership.core.health import LocalHealth
from membership.core.members import Member, Members, description_of
from membership.core.twins import Twins
from mesh.ids import Address, NodeId
from mesh.view import PeerState
from mesh.wire.gossip import Alive, Claim, Left
from mesh.wire.twin import ProcessRun, TwinAnswer

if TYPE_CHECKING:
    from membership.core.dissemination import Rumours

MAX_COUNTER = 2**48 - 1  # one less than the wire's bound, so that a refutation of anything accepted still fits


class SelfClaimProcessing:
    """The part of `membership.core.claims` that is about this node itself."""

    me: NodeId
    myself: Member
    members: Members
    words: ClaimVerifier
    config: MembershipConfig
    health: LocalHealth
    rumours: Rumours
    left: bool
    behind: bool
    _changes: list[Effect]
    _news: dict[NodeId, Claim]

    def _begin_hearing_of_self(self, me: Alive, now: float) -> None:
        self.refutations = self.conflicts = 0
        self.twins = Twins(me, now)
        self._held: Alive | None = None  # words of another run, until it is known whether that lives
        self._last_renewal_at = -1e9

    def twin_asked(self, by: ProcessRun, now: float) -> tuple[TwinAnswer, list[Effect]]:
        """A process that says it is this node asks who we are."""
        answer, effects = self.twins.asked(by, now)
        return answer, [] if self.left else effects

    def twin_found(self, place: Address, answer: TwinAnswer | None, now: float) -> list[Effect]:
        """What came of a `FindTwin`. A process that is displaced falls silent: a goodbye would be taken for the other's."""
        if self.left:
            return []
        effects = self.twins.found(place, answer, now)
        held, self._held = self._held, None
        if any(isinstance(effect, ProcessDisplaced) for effect in effects):
            self.left = True
        elif held is not None:
            self._hear_of_myself(held, held, now)
        return effects

    def _hear_of_myself(self, claim: Claim, words: Alive | Left | None, now: float) -> list[Claim]:
        me = self.myself
        told, mine = (claim.epoch, claim.incarnation), (me.epoch, me.incarnation)
        if told < mine:
            if not isinstance(claim, Alive):
                self._tell(me.alive_claim())  # a stale accusation still travels: so must its answer
            return [me.alive_claim()]
        if told > mine and (words is None or (words.epoch, words.incarnation) != told):
            self.behind = True  # words of ours that we do not know: whoever has them will show them in an exchange
            return [me.alive_claim()]
        if (told > mine or isinstance(claim, Left)) and not (words and self.words.hold(words, self.words.key)):
            return []
        if isinstance(claim, Alive):
            if told == mine and description_of(claim) == me.description:
                return []
            if told == mine and not self.words.hold(claim, self.words.key):
                return []
            # A run of this node that this one knows nothing of: a lost epoch file, or a copy of the data directory.
            self.conflicts += 1
        if self._is_of_another_run(words) and not self._goes_beyond(words, now):
            return []
        if isinstance(claim, Alive):
            if now - self._last_renewal_at < self.config.probe_period_s:
                return []  # two copies would otherwise outbid one another as fast as the network allows
            self._last_renewal_at = now
        if claim.epoch >= MAX_COUNTER or claim.incarnation >= MAX_COUNTER:
            self.conflicts += 1
            return []
        self.refutations += 1
        self.health.note(+1)
        if claim.epoch > me.epoch:
            me.epoch, me.incarnation = claim.epoch + 1, 0
            self._changes.append(EpochRenewed(me.epoch))
        else:
            me.incarnation = claim.incarnation + 1
        me.description = (me.epoch, me.incarnation, *me.description[2:])
        me.signature = self.words.signed(me.alive_claim()).signature
        self.members.put(me)
        self._changes.append(MemberChanged(self.me, PeerState.ALIVE, PeerState.ALIVE))
        self._tell(me.alive_claim())
        return [me.alive_claim()]

    def _is_of_another_run(self, words: Alive | Left | None) -> TypeGuard[Alive]:
        """Whether this node's key said that at this run's count or beyond it, and this run did not."""
        me = self.myself
        return (
            isinstance(words, Alive)
            and (words.epoch, words.incarnation) >= (me.epoch, me.incarnation)
            and description_of(words) != me.description
            and self.words.hold(words, self.words.key)
        )

    def _goes_beyond(self, words: Alive, now: float) -> bool:
        """Whether to say something later than these words now; else they are held until it is known who said them."""
        beyond, effects = self.twins.hear(words.address, now)
        self._changes += effects
        self._held = None if beyond else words
        return beyond

    def _tell(self, claim: Claim) -> None:
        self.rumours.put(claim)
        self._news[claim.node] = claim
