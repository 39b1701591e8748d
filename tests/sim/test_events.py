"""The order in which a simulated mesh lives through what happens to it."""

from __future__ import annotations

import heapq

from hypothesis import given
from hypothesis import strategies as st

from membership.simulation.events import Events, ScheduledEvent


def nothing() -> None:
    """An event that does nothing."""


@given(st.lists(st.one_of(st.floats(0, 0.004), st.floats(0, 3)), max_size=40), st.lists(st.floats(0, 1), max_size=40))
def test_events_come_as_from_one_heap_whatever_is_scheduled_on_the_way(delays_s: list[float], steps_s: list[float]) -> None:
    events = Events()
    heap: list[tuple[float, int]] = []
    now, until, number = 0.0, 0.0, 0
    waiting = list(reversed(delays_s))
    for step_s in (*steps_s, 1000.0):
        until += step_s
        while True:
            if waiting:
                number += 1
                at = now + waiting.pop()
                events.put(at, nothing, (number,))
                heapq.heappush(heap, (at, number))
            taken = events.take(until)
            if taken is None:
                assert not heap or heap[0][0] > until
                break
            now, expected = taken[0], heapq.heappop(heap)
            assert (taken[0], taken[1], taken[3]) == (*expected, (expected[1],))
        now = until
    assert not heap and not waiting


def test_what_falls_on_one_moment_comes_in_the_order_of_scheduling() -> None:
    events = Events()
    for name in "abc":
        events.put(1.0, nothing, (name,))
    assert events.take(0.5) is None
    order: list[object] = []
    while (event := events.take(1.0)) is not None:
        order.append(event[3][0])
        if event[3][0] == "a":
            events.put(1.0, nothing, ("d",))
    assert order == ["a", "b", "c", "d"]


def test_an_event_is_a_time_a_number_and_something_to_do() -> None:
    events = Events()
    events.put(0.25, nothing, ())
    event: ScheduledEvent | None = events.take(1.0)
    assert event == (0.25, 1, nothing, ())
    assert events.take(1.0) is None
