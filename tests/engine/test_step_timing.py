"""A step hangs when it takes many times what steps of its size take here; until then nobody is called stalled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mesh.view import Facts, Load, Readiness
from node.engine.scheduling.step_timing import AVERAGING, FIRST_STEP_S, STALL_AFTER_S, STALL_FACTOR, StepTiming
from node.serving.readiness_monitor import readiness_of

pytestmark = pytest.mark.no_kernel


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timing(clock: Clock) -> StepTiming:
    return StepTiming(clock)


def plan(rows: int, layers: int = 4) -> Any:
    chunks = [SimpleNamespace(count=rows, draft=())]
    return SimpleNamespace(lane=SimpleNamespace(start=2, end=2 + layers), chunks=chunks)


def take(timing: StepTiming, clock: Clock, rows: int, took_s: float, layers: int = 4) -> None:
    timing.begin(plan(rows, layers))
    clock.now += took_s
    assert timing.end(plan(rows, layers)) == pytest.approx(took_s)


def deadline_s(timing: StepTiming, clock: Clock, rows: int, layers: int = 4) -> float:
    """After so long a step of so many rows is overdue."""
    timing.begin(plan(rows, layers))
    clock.now += 1e6
    found = 1e6 - timing.overdue_s()
    timing.give_up()
    return found


def test_a_step_is_overdue_once_it_takes_so_many_times_the_average_of_its_size(timing: StepTiming, clock: Clock) -> None:
    assert timing.overdue_s() == 0.0
    take(timing, clock, 8, 1.0)
    take(timing, clock, 8, 2.0)
    average_s = 1.0 + AVERAGING * 1.0
    timing.begin(plan(8))
    clock.now += STALL_FACTOR * average_s
    assert timing.overdue_s() == 0.0
    clock.now += 0.5
    assert timing.overdue_s() == pytest.approx(0.5)
    assert readiness_of(Facts(), Load(), timing.overdue_s()) is Readiness.STALLED
    timing.end(plan(8))
    assert timing.overdue_s() == 0.0, "it came to an end"


def test_what_short_steps_take_says_nothing_of_long_ones(timing: StepTiming, clock: Clock) -> None:
    for _ in range(50):
        take(timing, clock, 1, 0.02)
    take(timing, clock, 512, 3.0)
    assert deadline_s(timing, clock, 1) == pytest.approx(STALL_AFTER_S), "however fast, a machine may be busy for a second"
    assert deadline_s(timing, clock, 512) == pytest.approx(STALL_FACTOR * 3.0)
    assert deadline_s(timing, clock, 500) == pytest.approx(STALL_FACTOR * 3.0), "about as many"


def test_the_first_step_of_a_size_has_time_by_what_smaller_ones_took(timing: StepTiming, clock: Clock) -> None:
    assert deadline_s(timing, clock, 1) == pytest.approx(STALL_FACTOR * FIRST_STEP_S)
    take(timing, clock, 1, 0.5)
    assert deadline_s(timing, clock, 16) == pytest.approx(STALL_FACTOR * 16 * 0.5)
    assert deadline_s(timing, clock, 2) == pytest.approx(STALL_FACTOR * FIRST_STEP_S)
    assert deadline_s(timing, clock, 16, layers=8) == pytest.approx(STALL_FACTOR * FIRST_STEP_S), "another span"


def test_an_outlier_is_forgotten(timing: StepTiming, clock: Clock) -> None:
    take(timing, clock, 4, 1.0)
    take(timing, clock, 4, 60.0)
    for _ in range(60):
        take(timing, clock, 4, 1.0)
    assert deadline_s(timing, clock, 4) == pytest.approx(STALL_FACTOR * 1.0, rel=0.01)


def test_a_step_that_failed_is_neither_under_way_nor_counted(timing: StepTiming, clock: Clock) -> None:
    take(timing, clock, 4, 1.0)
    timing.begin(plan(4))
    clock.now += 50.0
    assert timing.overdue_s() > 0
    timing.give_up()
    assert timing.overdue_s() == 0.0 and deadline_s(timing, clock, 4) == pytest.approx(STALL_FACTOR * 1.0)
