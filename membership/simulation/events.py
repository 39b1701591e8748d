"""The scheduled events of a simulated mesh, in order of time, then of scheduling.

Events wait in buckets of half a millisecond, each sorted when its time comes: a mesh of ten thousand always has tens of
thousands of timers ahead, and a heap of them would cost more than anything else about a datagram.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable

_BUCKETS_A_SECOND = 2000

ScheduledEvent = tuple[float, int, Callable[..., None], tuple[object, ...]]
"""(time, number, callback, its arguments); the numbers are all different, so callbacks are never compared."""


class Events:
    """A queue of scheduled events."""

    def __init__(self) -> None:
        self.taken = 0
        self._count = 0
        self._ahead: dict[int, list[ScheduledEvent]] = {}
        self._numbers: list[int] = []  # of the buckets ahead, as a heap
        self._number = -1  # of the bucket that is being emptied
        self._bucket: list[ScheduledEvent] = []
        self._next = 0  # in that bucket

    def put(self, at: float, what: Callable[..., None], with_what: tuple[object, ...]) -> None:
        """Schedules a callback. `at`: not before the time of the last event taken."""
        self._count += 1
        event = (at, self._count, what, with_what)
        number = int(at * _BUCKETS_A_SECOND)
        if number <= self._number:
            insort(self._bucket, event, self._next)
        elif (bucket := self._ahead.get(number)) is not None:
            bucket.append(event)
        else:
            self._ahead[number] = [event]
            heapq.heappush(self._numbers, number)

    def take(self, until: float) -> ScheduledEvent | None:
        """Returns and removes the next event, if it is due by `until`."""
        if self._next == len(self._bucket):
            if not self._numbers or self._numbers[0] > until * _BUCKETS_A_SECOND:
                return None
            self._number = heapq.heappop(self._numbers)
            self._bucket = sorted(self._ahead.pop(self._number))
            self._next = 0
        event = self._bucket[self._next]
        if event[0] > until:
            return None
        self._next += 1
        self.taken += 1
        return event
