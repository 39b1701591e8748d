"""What an entry does with a peer's BUSY: another peer at once, twice; then it waits, here, where it can still go anywhere.

The receiver decides, since only it knows its load now; a refusal costs one round trip and carries that load. In
simulation two bounces cut the wait of power-of-two tenfold. More than two gain nothing and eat the mesh when all are
full. Waiting at the entry binds late: a request in a peer's queue is stuck with that peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.ids import NodeId

if TYPE_CHECKING:
    from random import Random

MAX_BOUNCES = 2
MIN_WAIT_S = 0.05
MAX_WAIT_S = 2.0
"""Of one wait; the request's deadline and admission bound their sum."""


@dataclass(frozen=True, slots=True)
class PlanElsewhere:
    """Plan again, without these."""

    excluded: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class WaitAtEntry:
    """Plan again after `wait_s`, with everybody; sooner when a peer's load record tells of room."""

    wait_s: float


Bounced = PlanElsewhere | WaitAtEntry


class RefusalHistory:
    """The refusals of one request, since it last waited or was taken."""

    def __init__(self) -> None:
        self._refused: list[NodeId] = []
        self._soonest_s = MAX_WAIT_S
        self._waits = 0

    @property
    def excluded(self) -> frozenset[NodeId]:
        return frozenset(self._refused)

    def busy(self, node: NodeId, retry_after_s: float, rng: Random, *, others: bool = True) -> Bounced:
        """`node` refused, and expects room after `retry_after_s`. others: some peer is left that has not refused.

        The wait is the soonest of what the peers expect, grows with each round, and is spread by half so that those who
        were refused together do not come back together.
        """
        again = node in self._refused  # it was asked although it had refused: there is nobody else
        if not again:
            self._refused.append(node)
        self._soonest_s = min(self._soonest_s, max(MIN_WAIT_S, retry_after_s))
        if others and not again and len(self._refused) <= MAX_BOUNCES:
            return PlanElsewhere(self.excluded)
        self._waits += 1
        wait_s = min(MAX_WAIT_S, self._soonest_s * 2.0 ** (min(self._waits, 16) - 1))
        self._refused.clear()
        self._soonest_s = MAX_WAIT_S
        return WaitAtEntry(wait_s * rng.uniform(0.5, 1.0))

    def taken(self) -> None:
        """A path took the request: a later refusal, on a later attempt, starts anew."""
        self._refused.clear()
        self._soonest_s = MAX_WAIT_S
        self._waits = 0
