"""Admission at the entry: take a request in, or say no before any work is done.

Bounds are on expected waiting, not on counts alone: a queue of a hundred short requests is fine, one of ten long ones
may not be. A request that cannot meet its own deadline is refused at once rather than timed out later (Mooncake calls
it early rejection). The answer tells when it is worth coming back; jitter is added where the answer is written, so that
this stays a function of what it is told.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import BadRequest, LocalError, Refused

SHORTEST_RETRY_S = 0.5
LONGEST_RETRY_S = 60.0
"""The official clients obey `Retry-After` to the letter, and some give up on more than two minutes."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    running: int = 1024  # streams that this entry drives at once: each holds text, journal and a connection
    waiting: int = 256  # of them, those without a path yet
    wait_s: float = 30.0  # longest expected wait before the first token is computed

    def __post_init__(self) -> None:
        if self.running < 1 or self.waiting < 0 or not self.wait_s > 0.0:
            raise BadRequest(f"admission needs running >= 1, waiting >= 0 and wait_s > 0, got {self}")


@dataclass(frozen=True, slots=True)
class AdmissionStatistics:
    running: int
    waiting: int
    admitted: int
    refused_full: int
    refused_wait: int
    refused_deadline: int


class Admission:
    """Counts what this entry drives. `admit`, then `started` when a path took it, `left` on every way out."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self._limits = limits or AdmissionLimits()
        self._running = 0
        self._waiting = 0
        self._admitted = 0
        self._refused_full = 0
        self._refused_wait = 0
        self._refused_deadline = 0

    def admit(self, expected_wait_s: float = 0.0, deadline_s: float | None = None, least_work_s: float = 0.0) -> None:
        """Takes one request in, as waiting.

        expected_wait_s: queues on the best path now. deadline_s: what is left of the request's own time, None: no end.
        least_work_s: what it would take on an idle path.

        Raises:
            Refused: too many, too long, or too late; with the time after which it may be otherwise. Nothing is counted.
        """
        limits = self._limits
        if self._running >= limits.running or self._waiting >= limits.waiting:
            self._refused_full += 1
            raise Refused(
                f"this node drives {self._running} requests, {self._waiting} of them waiting; "
                f"its limits are {limits.running} and {limits.waiting}; try another node or later",
                retry_after_s(expected_wait_s),
            )
        if expected_wait_s > limits.wait_s:
            self._refused_wait += 1
            raise Refused(
                f"the mesh is overloaded: the expected wait is {expected_wait_s:.1f} s, "
                f"the limit {limits.wait_s:.1f} s; try later",
                retry_after_s(expected_wait_s - limits.wait_s),
            )
        if deadline_s is not None and expected_wait_s + least_work_s > deadline_s:
            self._refused_deadline += 1
            raise Refused(
                f"the request's deadline is in {deadline_s:.1f} s but its answer would take "
                f"{expected_wait_s + least_work_s:.1f} s; allow more time or try later",
                retry_after_s(expected_wait_s),
            )
        self._admitted += 1
        self._running += 1
        self._waiting += 1

    def started(self) -> None:
        """A path took the request: it waits no more.

        Raises:
            LocalError: nothing waits.
        """
        if self._waiting < 1:
            raise LocalError("a request started that was not waiting")
        self._waiting -= 1

    def parked(self) -> None:
        """Its path is lost and there is none to be had: it waits again, whatever the limits say.

        Raises:
            LocalError: all wait already.
        """
        if self._waiting >= self._running:
            raise LocalError("a request was parked that was not running")
        self._waiting += 1

    def left(self, *, was_waiting: bool) -> None:
        """The request is over, or its client left.

        Raises:
            LocalError: there is no such request.
        """
        if self._running < 1 or (was_waiting and self._waiting < 1) or (not was_waiting and self._waiting >= self._running):
            raise LocalError("a request left that was not here")
        self._running -= 1
        self._waiting -= 1 if was_waiting else 0

    def statistics(self) -> AdmissionStatistics:
        return AdmissionStatistics(
            self._running, self._waiting, self._admitted, self._refused_full, self._refused_wait, self._refused_deadline
        )


def retry_after_s(expected_s: float) -> float:
    """When it is worth coming back: the expected time, within bounds."""
    return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, expected_s))
