"""Admission at the entry, and what the entry does when a peer refuses to open a sequence.

Bounds are on expected waiting, not on counts alone: a queue of a hundred short requests is fine, one of ten long ones may not be.
A request that cannot meet its own deadline is refused at once rather than timed out later (Mooncake: early rejection). The answer
says when to try again; jitter is added where the answer is written, so that this stays a pure function.

A peer decides whether it is full, since it alone knows its load now; a refusal costs one round trip and carries that load. After
a refusal the entry tries another peer at once, twice; then the request waits at the entry, where it can still go to any peer. In
simulation two refusals cut the wait of power-of-two tenfold; more gain nothing and load a full mesh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.errors import BadRequest, Refused
from mesh.ids import NodeId

if TYPE_CHECKING:
    from random import Random


MAX_REROUTES = 2  # refusals that are answered by another path at once, between two waits
MIN_WAIT_S = 0.05
MAX_WAIT_S = 2.0
"""Of one wait; the request's deadline and admission bound their sum."""


@dataclass(frozen=True, slots=True)
class PlanElsewhere:
    """Plan again, without these."""

    excluded: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class WaitAtEntry:
    """Plan again after `wait_s`, with all peers."""

    wait_s: float


AfterRefusal = PlanElsewhere | WaitAtEntry


class RefusalHistory:
    """The refusals of one request, since it last waited or was taken."""

    def __init__(self) -> None:
        self._refused: list[NodeId] = []
        self._soonest_s = MAX_WAIT_S
        self._waits = 0

    @property
    def excluded(self) -> frozenset[NodeId]:
        return frozenset(self._refused)

    def refused(self, node: NodeId, retry_after_s: float, rng: Random, *, others: bool = True) -> AfterRefusal:
        """`node` refused, and expects room after `retry_after_s`. others: some peer is left that has not refused.

        The wait is the shortest that a peer expects, grows with each round, and is spread by half so that requests that
        were refused together do not come back together.
        """
        again = node in self._refused  # it was asked although it had refused: there is no other peer
        if not again:
            self._refused.append(node)
        self._soonest_s = min(self._soonest_s, max(MIN_WAIT_S, retry_after_s))
        if others and not again and len(self._refused) <= MAX_REROUTES:
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


MIN_RETRY_S = 0.5
MAX_RETRY_S = 60.0
"""The official clients obey `Retry-After` to the letter, and some give up on more than two minutes."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    running: int = 4096  # requests that this entry drives at once: each holds text, a core and a connection
    waiting: int = 2048  # of them, those without a token yet
    wait_s: float = 30.0  # longest expected wait before the first token is computed

    def __post_init__(self) -> None:
        if self.running < 1 or self.waiting < 0 or not self.wait_s > 0.0:
            raise BadRequest(f"admission needs running >= 1, waiting >= 0 and wait_s > 0, got {self}")


def admit(
    limits: AdmissionLimits, *, running: int, waiting: int, expected_wait_s: float = 0.0, deadline_s: float | None = None
) -> None:
    """Returns when one request more may come in.

    running, waiting: what this entry drives now, those that wait included in the first. expected_wait_s: queues on the
    best path now. deadline_s: what is left of the request's own time; None: no end.

    Raises:
        Refused: too many, too long, or too late; with the time after which it may be otherwise.
    """
    if running >= limits.running or waiting >= limits.waiting:
        raise Refused(
            f"this node drives {running} requests, {waiting} of them waiting; "
            f"its limits are {limits.running} and {limits.waiting}; try another node or later",
            retry_after_s(expected_wait_s),
        )
    if expected_wait_s > limits.wait_s:
        raise Refused(
            f"the mesh is overloaded: the expected wait is {expected_wait_s:.1f} s, the limit {limits.wait_s:.1f} s; try later",
            retry_after_s(expected_wait_s - limits.wait_s),
        )
    if deadline_s is not None and expected_wait_s > deadline_s:
        raise Refused(
            f"the request's deadline is in {deadline_s:.1f} s but its work would begin in {expected_wait_s:.1f} s; "
            "allow more time or try later",
            retry_after_s(expected_wait_s),
        )


def retry_after_s(expected_s: float) -> float:
    """When it is worth coming back: the expected time, within bounds."""
    return min(MAX_RETRY_S, max(MIN_RETRY_S, expected_s))
