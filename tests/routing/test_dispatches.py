"""Own dispatches count at once, until a newer load record of the peer includes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import LocalError
from mesh.ids import NodeId
from routing.dispatches import NOTHING, Dispatch, Dispatches

A, B = NodeId("a"), NodeId("b")


def test_a_dispatch_counts_at_once_until_a_newer_record_includes_it() -> None:
    ledger = Dispatches()
    ledger.dispatch(A, 10.0, prefill_tokens=50)
    before, after = ledger.own(A, record_at=9.0), ledger.own(A, record_at=11.0)
    assert (before.added, before.prefill_tokens, before.in_flight) == (1, 50, 1)
    assert (after.added, after.prefill_tokens, after.in_flight) == (0, 0, 1)
    assert ledger.own(B, 0.0) == NOTHING
    assert ledger.in_flight() == {A: 1}


def test_dispatches_that_ended_since_the_record_are_subtracted() -> None:
    ledger = Dispatches()
    sent = ledger.dispatch(A, 1.0)
    assert ledger.own(A, record_at=2.0).ended == 0
    ledger.done(sent, 3.0)
    assert ledger.own(A, record_at=2.0).ended == 1
    assert ledger.own(A, record_at=0.5).ended == 0  # the record never counted it
    assert ledger.own(A, record_at=4.0).ended == 0  # the record no longer counts it


def test_a_second_end_or_one_of_a_forgotten_peer_changes_nothing() -> None:
    ledger = Dispatches()
    first, second = ledger.dispatch(A, 0.0), ledger.dispatch(A, 0.0)
    ledger.done(first, 1.0)
    ledger.done(first, 5.0, ok=False)
    assert (ledger.own(A, 9.0).in_flight, ledger.own(A, 9.0).failed) == (1, 0.0)
    ledger.forget(A)
    ledger.done(second, 1.0)
    assert ledger.own(A, 0.0) == NOTHING
    with pytest.raises(LocalError):
        ledger.done(ledger.dispatch(B, 5.0), 4.0)


def test_only_completed_dispatches_change_the_response_time() -> None:
    ledger = Dispatches()
    assert ledger.residency_s(4.0) == 4.0
    for ok, took_s in ((True, 1.0), (False, 9.0), (None, 9.0), (True, 2.0)):
        ledger.done(ledger.dispatch(A, 0.0), took_s, ok=ok)
    own = ledger.own(A, 99.0)
    assert own.response_ms == pytest.approx(1100.0)
    assert 0.9 < own.failed < 1.0 and 2.9 < own.finished < 3.0
    assert ledger.residency_s(4.0) == pytest.approx(1.1)


def test_failures_decay_with_later_outcomes() -> None:
    ledger = Dispatches()
    ledger.done(ledger.dispatch(A, 0.0), 1.0, ok=False)
    for _ in range(2000):
        ledger.done(ledger.dispatch(A, 0.0), 1.0)
    assert ledger.own(A, 2.0).failed < 0.01


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 5), st.integers(0, 5)), max_size=40), st.integers(0, 10))
def test_a_record_and_own_work_together_count_what_runs_now(jobs: list[tuple[NodeId, int, int]], record_at: int) -> None:
    """If all work were own, the record plus `added` minus `ended` would be the number of running dispatches."""
    ledger, now = Dispatches(), 11.0
    sent: list[tuple[Dispatch, float]] = []
    for node, start, length in jobs:
        sent.append((ledger.dispatch(node, float(start)), start + length))
    for dispatch, end in sent:
        if end <= now:
            ledger.done(dispatch, float(end))
    for node in (A, B):
        in_record = sum(1 for each, end in sent if each.node == node and each.at < record_at <= end)
        running = sum(1 for each, end in sent if each.node == node and end > now)
        own = ledger.own(node, float(record_at))
        assert own.in_flight == running
        assert in_record + own.added - own.ended == running
