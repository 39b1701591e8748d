"""Refused senders: counted by source and reason, bounded, logged once a minute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.links.refusals import MAX_COUNTED, MAX_SOURCES, WINDOW_S, Refusal, Refusals


def test_a_source_and_reason_is_logged_once_a_minute() -> None:
    refusals = Refusals()
    assert refusals.note("10.0.0.7", "wrong key", 0.0)
    assert not refusals.note("10.0.0.7", "wrong key", 59.0)
    assert refusals.note("10.0.0.7", "damaged", 59.0) and refusals.note("10.0.0.8", "wrong key", 59.0)
    assert refusals.note("10.0.0.7", "wrong key", 60.0)


def test_only_the_last_minute_is_reported_and_the_most_frequent_first() -> None:
    refusals = Refusals()
    for at in (0.0, 50.0, 61.0):
        refusals.note("a", "wrong key", at)
    refusals.note("b", "damaged", 61.0)
    assert refusals.recent(61.0) == [Refusal("a", "wrong key", 2), Refusal("b", "damaged", 1)]
    assert refusals.recent(61.0 + WINDOW_S + 1) == []


def test_the_count_of_a_flood_is_capped() -> None:
    refusals = Refusals()
    for _ in range(1000):
        refusals.note("a", "wrong key", 1.0)
    assert refusals.recent(1.0) == [Refusal("a", "wrong key", MAX_COUNTED)]


@given(st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 300)), max_size=600))
def test_forged_sources_fill_a_table_of_fixed_size(noted: list[tuple[int, float]]) -> None:
    refusals = Refusals()
    for number, at in noted:
        refusals.note(f"host-{number}", "foreign", at)
    assert refusals.entries <= MAX_SOURCES
