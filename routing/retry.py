"""The retry budget: second tries may be a tenth of recent requests, and three more.

A mesh in trouble must not be drowned by its own second tries. Only the entry retries, never a stage, and all its
requests share one budget. A small constant lets a quiet node retry at all. The rule of Envoy's and Finagle's budgets.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.errors import MeshError, PeerLost, Refused, RemoteError

if TYPE_CHECKING:
    from random import Random

WINDOW_S = 10
RETRY_SHARE = 0.1
RETRY_FLOOR = 3

FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 2.0


@dataclass(frozen=True, slots=True)
class RetryStatistics:
    requests_recent: int
    retries_recent: int
    granted: int
    denied: int


class RetryBudget:
    """Counts requests and retries by the second, over the last ten. One for a node."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int, int]] = deque()  # (second, requests, retries), oldest first
        self._granted = 0
        self._denied = 0

    def request(self, now: float) -> None:
        """A request came in: it earns a tenth of a retry."""
        self._count(now, 1, 0)

    def spend(self, now: float) -> bool:
        """Whether one more retry may be made now; if so it is counted."""
        requests, retries = self._recent(now)
        if retries + 1 > RETRY_FLOOR + int(requests * RETRY_SHARE):
            self._denied += 1
            return False
        self._count(now, 0, 1)
        self._granted += 1
        return True

    def statistics(self, now: float) -> RetryStatistics:
        requests, retries = self._recent(now)
        return RetryStatistics(requests, retries, self._granted, self._denied)

    def _recent(self, now: float) -> tuple[int, int]:
        while self._seconds and self._seconds[0][0] <= int(now) - WINDOW_S:
            self._seconds.popleft()
        return sum(requests for _, requests, _ in self._seconds), sum(retries for _, _, retries in self._seconds)

    def _count(self, now: float, requests: int, retries: int) -> None:
        self._recent(now)
        second = int(now)
        if self._seconds and self._seconds[-1][0] >= second:
            second, before, retried = self._seconds.pop()
            requests, retries = requests + before, retries + retried
        self._seconds.append((second, requests, retries))


def retryable(error: MeshError) -> bool:
    """Whether another peer may do better: the peer is gone, broken or busy. What the client or we did wrong stays wrong."""
    match error:
        case Refused(quota=quota):
            return not quota
        case PeerLost() | RemoteError():
            return True
        case _:
            return False


def backoff_s(attempt: int, rng: Random) -> float:
    """Wait before the nth retry: none before the first, which goes to another peer at once, then full jitter up to a
    limit that doubles (Brooker, "Exponential backoff and jitter", 2015).
    """
    if attempt <= 1:
        return 0.0
    return rng.uniform(0.0, min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (min(attempt, 16) - 2)))
