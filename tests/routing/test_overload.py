"""Admission, breaker and refusals: what limits the load of a mesh in trouble."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest, Refused
from mesh.ids import NodeId
from routing.admission import (
    MAX_REROUTES,
    MAX_WAIT_S,
    AdmissionLimits,
    RefusalHistory,
    admit,
    retry_after_s,
)
from routing.breaker import FAILURES_TO_OPEN, MAX_OPEN_S, PROBE_S, Breakers, Circuit

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


# Admission


@pytest.mark.parametrize(
    ("wait_s", "deadline_s", "retry_s"),
    [(0.0, None, None), (30.0, None, None), (31.5, None, 1.5), (5.0, 6.0, None), (7.0, 6.0, 7.0), (999.0, None, 60.0)],
)
def test_a_request_is_refused_by_its_expected_wait_and_its_own_deadline(
    wait_s: float, deadline_s: float | None, retry_s: float | None
) -> None:
    def ask() -> None:
        admit(AdmissionLimits(), running=3, waiting=1, expected_wait_s=wait_s, deadline_s=deadline_s)

    if retry_s is None:
        ask()
    else:
        with pytest.raises(Refused) as caught:
            ask()
        assert (caught.value.retry_after_s, caught.value.quota) == (retry_s, False)


def test_a_full_entry_refuses_with_its_limits() -> None:
    limits = AdmissionLimits(running=2, waiting=1)
    admit(limits, running=1, waiting=0)
    with pytest.raises(Refused, match="1 of them waiting"):
        admit(limits, running=1, waiting=1)
    with pytest.raises(Refused, match="drives 2 requests"):
        admit(limits, running=2, waiting=0)


def test_invalid_limits_are_refused() -> None:
    for limits in ({"running": 0}, {"waiting": -1}, {"wait_s": 0.0}, {"wait_s": float("nan")}):
        with pytest.raises(BadRequest):
            AdmissionLimits(**limits)


@given(st.floats(allow_nan=False))
def test_the_retry_time_is_bounded(expected_s: float) -> None:
    assert 0.5 <= retry_after_s(expected_s) <= 60.0


# Breaker


def opened(node: NodeId = A, now: float = 0.0) -> Breakers:
    breakers = Breakers()
    for _ in range(FAILURES_TO_OPEN):
        breakers.failed(node, now)
    return breakers


def test_five_failures_in_a_row_open_the_circuit_and_four_do_not() -> None:
    breakers = Breakers()
    for _ in range(FAILURES_TO_OPEN - 1):
        breakers.failed(A, 0.0)
    assert breakers.allows(A, 0.0)
    breakers.succeeded(A)
    breakers.failed(A, 0.0)
    assert breakers.allows(A, 0.0)
    assert not opened().allows(A, 0.99)


def test_half_open_lets_one_probe_through_and_its_outcome_decides() -> None:
    breakers = opened()
    assert breakers.circuit(A, 1.0) is Circuit.HALF_OPEN
    assert breakers.allows(A, 1.0)
    breakers.dispatched(A, 1.0)
    assert not breakers.allows(A, 1.5)
    breakers.failed(A, 2.0)
    assert [breakers.allows(A, now) for now in (3.9, 4.0)] == [False, True]  # now open for twice as long
    breakers.dispatched(A, 4.0)
    breakers.succeeded(A)
    assert breakers.circuit(A, 4.0) is Circuit.CLOSED


def test_a_probe_without_an_outcome_does_not_exclude_the_peer_for_ever() -> None:
    breakers = opened()
    breakers.dispatched(A, 1.0)
    assert not breakers.allows(A, 1.0 + PROBE_S - 0.1)
    assert breakers.allows(A, 1.0 + PROBE_S)
    breakers.dispatched(A, 50.0)
    breakers.given_up(A)
    assert breakers.allows(A, 50.0)


def test_late_failures_of_earlier_requests_do_not_lengthen_the_time() -> None:
    breakers = opened()
    for _ in range(20):
        breakers.failed(A, 0.5)
    assert breakers.allows(A, 1.0)


def test_a_restart_closes_the_circuit_and_open_times_are_bounded() -> None:
    breakers = opened()
    now = 0.0
    for _ in range(40):
        now += MAX_OPEN_S
        assert breakers.allows(A, now)
        breakers.failed(A, now)
    assert breakers.statistics(now) == {A: Circuit.OPEN}
    breakers.restarted(A)
    assert breakers.allows(A, now)


def test_when_more_than_half_would_be_avoided_none_is() -> None:
    breakers = opened(A)
    assert breakers.avoided([A, B, C], 0.0) == {A}
    assert breakers.avoided([A, B], 0.0) == {A}
    assert breakers.avoided([A], 0.0) == frozenset()
    for _ in range(FAILURES_TO_OPEN):
        breakers.failed(B, 0.0)
    assert breakers.avoided([A, B, C], 0.0) == frozenset()


@given(st.lists(st.tuples(st.sampled_from(["fail", "succeed", "send", "give up"]), st.floats(0.0, 20.0)), max_size=60))
def test_every_circuit_allows_a_request_within_a_minute(events: list[tuple[str, float]]) -> None:
    breakers, now = Breakers(), 0.0
    for event, pause_s in events:
        now += pause_s
        match event:
            case "fail":
                breakers.failed(A, now)
            case "succeed":
                breakers.succeeded(A)
                assert breakers.allows(A, now)
            case "send":
                breakers.dispatched(A, now)
                if breakers.circuit(A, now) is not Circuit.CLOSED:
                    assert not breakers.allows(A, now)
            case _:
                breakers.given_up(A)
    assert breakers.allows(A, now + MAX_OPEN_S + PROBE_S)


# Refusals


def test_two_other_paths_then_a_wait_after_which_no_peer_is_excluded() -> None:
    history, rng = RefusalHistory(), Random(0)
    assert (history.refused(A, 1.0, rng), history.excluded) == (None, frozenset({A}))
    assert (history.refused(B, 0.2, rng), history.excluded) == (None, frozenset({A, B}))
    wait_s = history.refused(C, 1.5, rng)
    assert wait_s is not None and 0.1 <= wait_s <= 0.2
    assert history.excluded == frozenset()
    assert (history.refused(A, 1.0, rng), history.excluded) == (None, frozenset({A}))


def test_without_other_peers_the_request_waits_at_once_and_each_round_longer() -> None:
    history, rng = RefusalHistory(), Random(0)
    waits = [history.refused(A, 0.1, rng, others=False) for _ in range(8)]
    limits = [min(MAX_WAIT_S, 0.1 * 2**round_) for round_ in range(8)]
    for wait_s, limit_s in zip(waits, limits):
        assert wait_s is not None and limit_s / 2 <= wait_s <= limit_s
    history.reset()
    after_reset_s = history.refused(A, 0.1, rng, others=False)
    assert after_reset_s is not None and after_reset_s <= 0.1


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.floats(-1.0, 100.0), st.booleans()), max_size=50), st.integers(0, 99))
def test_reroutes_and_waits_after_refusals_are_bounded(refusals: list[tuple[NodeId, float, bool]], seed: int) -> None:
    history, rng, since_wait = RefusalHistory(), Random(seed), set[NodeId]()
    for node, retry_s, others in refusals:
        since_wait.add(node)
        wait_s = history.refused(node, retry_s, rng, others=others)
        if wait_s is None:
            assert history.excluded == since_wait and len(since_wait) <= MAX_REROUTES and others
        else:
            assert 0.0 < wait_s <= MAX_WAIT_S
            since_wait.clear()
