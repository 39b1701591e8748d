"""Admission, breaker and refusals: what keeps a mesh in trouble from drowning itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest, Refused
from mesh.ids import NodeId
from routing.admission import MAX_RETRY_S, MIN_WAITING, Admission, AdmissionLimits, Queue, retry_after_s
from routing.breaker import FAILURES_TO_OPEN, MAX_OPEN_S, PROBE_S, Breakers, Circuit

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


# Admission


@pytest.mark.parametrize(
    ("wait_s", "retries", "deadline_s", "refused"),
    [
        (0.0, 0, None, False),
        (2.4, 0, None, False),
        (2.5, 0, None, True),
        (2.5, 1, None, False),
        (4.1, 1, None, True),
        (8.0, 2, None, False),
        (8.1, 9, None, True),
        (1.5, 0, 2.5, False),
        (1.5, 0, 1.4, True),
    ],
)
def test_a_request_is_refused_by_its_expected_wait_and_its_own_deadline(
    wait_s: float, retries: int, deadline_s: float | None, refused: bool
) -> None:
    def ask() -> None:
        Admission().admit(Queue(30, 20, wait_s, 1.0), 0.0, retries=retries, deadline_s=deadline_s)

    if not refused:
        ask()
    else:
        with pytest.raises(Refused) as caught:
            ask()
        assert (caught.value.retry_after_s, caught.value.quota) == (wait_s, False)


def test_a_few_may_wait_however_long_it_seems() -> None:
    Admission().admit(Queue(30, MIN_WAITING - 1, 100.0, 0.1), 0.0)
    with pytest.raises(Refused):
        Admission().admit(Queue(30, MIN_WAITING, 100.0, 0.1), 0.0)


def test_a_full_entry_says_so() -> None:
    admission = Admission(AdmissionLimits(running=2, waiting=1))
    admission.admit(Queue(1, 0, 0.0, 1.0), 0.0)
    with pytest.raises(Refused, match="1 of them waiting"):
        admission.admit(Queue(1, 1, 0.0, 1.0), 0.0)
    with pytest.raises(Refused, match="drives 2 requests"):
        admission.admit(Queue(2, 0, 0.0, 1.0), 0.0)


def test_refused_clients_come_back_one_after_another_at_the_rate_of_starts() -> None:
    admission, times = Admission(), []
    for _ in range(200):
        with pytest.raises(Refused) as caught:
            admission.admit(Queue(900, 900, 20.0, 10.0), 100.0)
        times.append(caught.value.retry_after_s)
    assert times[0] == 20.0
    assert [round(later - earlier, 6) for earlier, later in pairwise(times)] == [0.1] * 199


def test_appointments_never_lie_beyond_what_clients_obey_and_do_not_outlive_the_load() -> None:
    admission = Admission()
    for _ in range(5000):
        with pytest.raises(Refused) as caught:
            admission.admit(Queue(900, 900, 20.0, 10.0), 100.0)
        assert caught.value.retry_after_s <= MAX_RETRY_S
    admission.admit(Queue(1, 0, 0.0, 10.0), 100.1)  # the queue is empty: nobody has to keep an appointment


def test_senseless_limits_are_named() -> None:
    for limits in ({"running": 0}, {"waiting": -1}, {"wait_s": 0.0}, {"wait_s": float("nan")}):
        with pytest.raises(BadRequest):
            AdmissionLimits(**limits)


@given(st.floats(allow_nan=False))
def test_the_time_to_come_back_is_bounded(expected_s: float) -> None:
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


def test_a_probe_that_says_nothing_does_not_shut_the_peer_out_for_ever() -> None:
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


def test_a_restart_clears_the_mark_and_open_times_are_bounded() -> None:
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
def test_every_peer_gets_a_chance_within_a_minute_of_silence(events: list[tuple[str, float]]) -> None:
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
