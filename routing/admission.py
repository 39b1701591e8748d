"""Admission at the entry, and what the entry does when a peer refuses to open a sequence.

Bounds are on the expected wait, not on counts alone: a queue of a hundred short requests is fine, ten long ones may be too many.
A request that cannot meet its own deadline is refused at once rather than timed out later (Mooncake: early rejection). The
refusal carries a time after which to try again; HTTP adds jitter when it writes the answer, so that this stays a pure function.

Each peer decides whether it is full, since only the peer has its current load; a refusal costs one round trip and carries that
load. After a refusal the entry tries another path at once, twice; then the request waits at the entry, from where any peer can
still be chosen. In simulation two such retries cut the wait of power-of-two tenfold; more gain nothing and load a full mesh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.errors import BadRequest, Refused
from mesh.ids import NodeId

if TYPE_CHECKING:
    from random import Random


MAX_REROUTES = 2  # refusals after which another path is planned at once, between two waits
MIN_WAIT_S = 0.05
MAX_WAIT_S = 2.0
"""Of one wait; `RetryLimits.refused_s` and the request's deadline bound their sum."""


class RefusalHistory:
    """The refusals of one generation's opens since its last wait or its last token."""

    def __init__(self) -> None:
        self._refused: list[NodeId] = []
        self._soonest_s = MAX_WAIT_S
        self._waits = 0

    @property
    def excluded(self) -> frozenset[NodeId]:
        """The peers that have refused; the next plan leaves them out."""
        return frozenset(self._refused)

    def refused(self, node: NodeId, retry_after_s: float, rng: Random, *, others: bool = True) -> float | None:
        """Records that `node` refused and expects room after `retry_after_s`, and decides what to do about it.

        Returns None to plan another path at once, without the `excluded` peers; or how long to wait in seconds, after which
        no peer is excluded. The wait is the shortest that a peer expects, doubles with each wait, and is spread by half so that
        requests that were refused together do not return together. others: some peer has not refused yet.
        """
        again = node in self._refused  # planned although it had refused, so there is no other peer
        if not again:
            self._refused.append(node)
        self._soonest_s = min(self._soonest_s, max(MIN_WAIT_S, retry_after_s))
        if others and not again and len(self._refused) <= MAX_REROUTES:
            return None
        self._waits += 1
        wait_s = min(MAX_WAIT_S, self._soonest_s * 2.0 ** (min(self._waits, 16) - 1))
        self._refused.clear()
        self._soonest_s = MAX_WAIT_S
        assert wait_s > 0.0, "a plan without a wait would ask a full mesh in a loop"
        return wait_s * rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Forgets all refusals: a path has computed a token, or every peer has refused and a wait begins."""
        self._refused.clear()
        self._soonest_s = MAX_WAIT_S
        self._waits = 0


MIN_RETRY_S = 0.5
MAX_RETRY_S = 60.0
"""The official clients obey `Retry-After` to the letter, and some give up on more than two minutes."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    running: int = 4096  # requests that this entry holds at once, each with text, cores and a connection
    waiting: int = 2048  # those of them that have no token yet
    wait_s: float = 30.0  # longest expected wait before the first token is computed

    def __post_init__(self) -> None:
        if self.running < 1 or self.waiting < 0 or not self.wait_s > 0.0:
            raise BadRequest(f"admission needs running >= 1, waiting >= 0 and wait_s > 0, got {self}")


def admit(
    limits: AdmissionLimits, *, running: int, waiting: int, expected_wait_s: float = 0.0, deadline_s: float | None = None
) -> None:
    """Returns if one more request may be admitted.

    running: requests at this entry now; waiting: those of them without a token. expected_wait_s: queues on the path planned
    last. deadline_s: what is left of the request's own time; None: no end.

    Raises:
        Refused: too many requests, too long a wait, or a deadline that cannot be met; with the time after which to try again.
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
    """Time after which to try again: the expected time, within bounds."""
    return min(MAX_RETRY_S, max(MIN_RETRY_S, expected_s))
