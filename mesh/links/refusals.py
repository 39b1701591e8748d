"""Counts the senders refused in the last minute, with the reasons; `mesh doctor` reports them, and each is logged once a minute.

The table has a fixed size, so a sender that forges addresses cannot use more memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_S = 60.0
MAX_SOURCES = 256
UNAUTHORIZED_FRAME = "it spoke of sequences in whose path it has no such part"
BAD_ACTIVATIONS = "it sent activations that are not finite numbers"
MAX_COUNTED = 60  # refusals of one source and reason within the window; a higher count is reported as this one


@dataclass(frozen=True, slots=True)
class Refusal:
    host: str  # or the node's id, where its link proved it
    reason: str
    count: int  # in the last minute; `MAX_COUNTED` stands for that many or more


class Refusals:
    def __init__(self) -> None:
        self._times: dict[tuple[str, str], deque[float]] = {}
        self._logged_at: dict[tuple[str, str], float] = {}

    def note(self, host: str, reason: str, now: float) -> bool:
        """Counts a refusal. Returns whether to log it: only the first of its source and reason within a minute is."""
        source = host, reason
        times = self._times.pop(source, None) or deque(maxlen=MAX_COUNTED)
        if len(self._times) >= MAX_SOURCES:
            oldest = next(iter(self._times))
            del self._times[oldest]
            self._logged_at.pop(oldest, None)
        self._times[source] = times  # at the end: the source with the oldest last refusal is dropped first
        times.append(now)
        if now - self._logged_at.get(source, -WINDOW_S) < WINDOW_S:
            return False
        self._logged_at[source] = now
        return True

    @property
    def entries(self) -> int:
        """Returns the size of the larger of the two tables; at most `MAX_SOURCES`."""
        return max(len(self._times), len(self._logged_at))

    def recent(self, now: float) -> list[Refusal]:
        """Returns the refusals of the last minute, the most frequent first."""
        counts = (
            Refusal(host, reason, sum(now - at <= WINDOW_S for at in times)) for (host, reason), times in self._times.items()
        )
        return sorted((refusal for refusal in counts if refusal.count), key=lambda r: (-r.count, r.host, r.reason))
