from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.ids import NodeId
from rag.clock import HybridClock, HybridTimestamp, hlc_of, is_too_far_ahead, unix_s_of

NODE = NodeId("a")
MOMENTS = st.floats(0, 4e9)


@given(st.lists(st.tuples(MOMENTS, st.integers(0, 1 << 57)), min_size=2))
def test_each_stamp_exceeds_all_issued_and_observed_before_whatever_the_wall_clock_does(
    events: list[tuple[float, int]],
) -> None:
    clock, greatest = HybridClock(NODE), 0
    for now_s, seen in events:
        clock.observe(seen)
        stamp = clock.next(now_s)
        assert stamp.hlc > max(greatest, seen)
        greatest = stamp.hlc


@given(MOMENTS)
def test_a_stamp_tells_its_time_to_the_millisecond(now_s: float) -> None:
    assert abs(unix_s_of(HybridClock(NODE).next(now_s).hlc) - now_s) < 0.002


def test_a_stamp_is_too_far_ahead_only_beyond_a_minute() -> None:
    assert not is_too_far_ahead(hlc_of(1059.0), 1000.0)
    assert is_too_far_ahead(hlc_of(1061.0), 1000.0)


def test_equal_times_are_ordered_by_node() -> None:
    assert HybridTimestamp(5, NodeId("b")) > HybridTimestamp(5, NodeId("a"))
    assert HybridTimestamp(6, NodeId("a")) > HybridTimestamp(5, NodeId("b"))
