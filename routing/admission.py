"""Admission at the entry: take a request in, or say no before any work is done.

Bounds are on expected waiting, not on counts alone: a queue of a hundred short requests is fine, one of ten long ones
may not be. A request that cannot meet its own deadline is refused at once rather than timed out later (Mooncake calls
it early rejection). The answer tells when it is worth coming back; jitter is added where the answer is written, so that
this stays a function of what it is told.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import BadRequest, Refused

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
