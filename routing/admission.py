"""Admission at the entry: which requests may wait there for room, and when the others should come back.

The bound is on expected waiting, not on counts alone: a queue of a hundred short requests is fine, one of ten long ones may not
be. A request that would wait longer than that, or past its own deadline, is refused before any work is done (Mooncake: early
rejection).

Refused clients get appointments: each is told to come back when those before it will have started, one after another at the rate
of the last starts, so that they neither return together nor while the queue is as long as now. A client that comes back (the
official ones send how often they did, and give up after the second time) may join a longer queue than a new one.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import BadRequest, Refused

MIN_RETRY_S = 0.5
MAX_RETRY_S = 60.0
"""The official clients obey `Retry-After` to the letter, and some give up on more than two minutes."""


MIN_WAITING = 16  # so many may wait however long it seems: the rate of starts is not known before some have started
WAIT_SHARES = (0.6, 1.0, 2.0)  # of `AdmissionLimits.wait_s`: for a new client, one that was refused once, and one more often


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    running: int = 4096  # requests that this entry drives at once: each holds text, a core and a connection
    waiting: int = 2048  # of them, those without a token yet
    wait_s: float = 4.0  # longest expected wait for room (`WAIT_SHARES`); after overload the mesh is back to normal that soon

    def __post_init__(self) -> None:
        if self.running < 1 or self.waiting < 0 or not self.wait_s > 0.0:
            raise BadRequest(f"admission needs running >= 1, waiting >= 0 and wait_s > 0, got {self}")


@dataclass(frozen=True, slots=True)
class Queue:
    """The entry as admission sees it."""

    running: int  # requests that it drives, the waiting ones included
    waiting: int
    expected_wait_s: float  # of a request that would join now
    start_rate: float  # requests a second


class Admission:
    """Of one entry. Pure: the time is an argument, and jitter is added where the answer is written."""

    def __init__(self, limits: AdmissionLimits | None = None) -> None:
        self.limits = limits or AdmissionLimits()
        self._next_appointment = 0.0

    def admit(self, queue: Queue, now: float, *, retries: int = 0, deadline_s: float | None = None) -> None:
        """Returns when one request more may wait here.

        retries: how often the client came back after a refusal. deadline_s: what is left of the request's own time; None: no end.

        Raises:
            Refused: too many, too long, or too late; with the time after which it may be otherwise.
        """
        limits, expected_s = self.limits, queue.expected_wait_s
        if queue.running >= limits.running or queue.waiting >= limits.waiting:
            raise Refused(
                f"this node drives {queue.running} requests, {queue.waiting} of them waiting; "
                f"its limits are {limits.running} and {limits.waiting}; try another node or later",
                self._appointment(queue, now),
            )
        longest_s = limits.wait_s * WAIT_SHARES[min(max(retries, 0), len(WAIT_SHARES) - 1)]
        if expected_s > longest_s and queue.waiting >= MIN_WAITING:
            raise Refused(
                f"the mesh is overloaded: the expected wait is {expected_s:.1f} s, the limit {longest_s:.1f} s; try later",
                self._appointment(queue, now),
            )
        if deadline_s is not None and expected_s > deadline_s:
            raise Refused(
                f"the request's deadline is in {deadline_s:.1f} s but its work would begin in {expected_s:.1f} s; "
                "allow more time or try later",
                self._appointment(queue, now),
            )

    def _appointment(self, queue: Queue, now: float) -> float:
        """Returns in how many seconds to come back, and keeps that place in the order for this client."""
        at = max(self._next_appointment, now + queue.expected_wait_s)
        self._next_appointment = min(at + 1.0 / queue.start_rate, now + MAX_RETRY_S)
        return retry_after_s(at - now)


def retry_after_s(expected_s: float) -> float:
    """When it is worth coming back: the expected time, within bounds."""
    return min(MAX_RETRY_S, max(MIN_RETRY_S, expected_s))
