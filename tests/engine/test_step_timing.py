"""A step hangs when it takes several times the average of its size; before that the node is not reported as stalled."""

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


def run_step(timing: StepTiming, clock: Clock, rows: int, took_s: float, layers: int = 4) -> None:
    timing.begin(plan(rows, layers))
    clock.now += took_s
    assert timing.end(plan(rows, layers)) == pytest.approx(took_s)


def deadline_s(timing: StepTiming, clock: Clock, rows: int, layers: int = 4) -> float:
    """Returns after how many seconds a step of `rows` rows is overdue."""
    timing.begin(plan(rows, layers))
    clock.now += 1e6
    deadline = 1e6 - timing.overdue_s()
    timing.discard()
    return deadline


def test_a_step_is_overdue_after_several_times_its_sizes_average(timing: StepTiming, clock: Clock) -> None:
    assert timing.overdue_s() == 0.0
    run_step(timing, clock, 8, 1.0)
    run_step(timing, clock, 8, 2.0)
    average_s = 1.0 + AVERAGING * 1.0
    timing.begin(plan(8))
    clock.now += STALL_FACTOR * average_s
    assert timing.overdue_s() == 0.0
    clock.now += 0.5
    assert timing.overdue_s() == pytest.approx(0.5)
    assert readiness_of(Facts(), Load(), timing.overdue_s()) is Readiness.STALLED
    timing.end(plan(8))
    assert timing.overdue_s() == 0.0, "the step has ended"


def test_times_of_small_steps_do_not_apply_to_large_ones(timing: StepTiming, clock: Clock) -> None:
    for _ in range(50):
        run_step(timing, clock, 1, 0.02)
    run_step(timing, clock, 512, 3.0)
    assert deadline_s(timing, clock, 1) == pytest.approx(STALL_AFTER_S), "a machine may be busy for a second"
    assert deadline_s(timing, clock, 512) == pytest.approx(STALL_FACTOR * 3.0)
    assert deadline_s(timing, clock, 500) == pytest.approx(STALL_FACTOR * 3.0), "the same power of two"


def test_the_deadline_of_a_new_size_scales_from_smaller_sizes(timing: StepTiming, clock: Clock) -> None:
    assert deadline_s(timing, clock, 1) == pytest.approx(STALL_FACTOR * FIRST_STEP_S)
    run_step(timing, clock, 1, 0.5)
    assert deadline_s(timing, clock, 16) == pytest.approx(STALL_FACTOR * 16 * 0.5)
    assert deadline_s(timing, clock, 2) == pytest.approx(STALL_FACTOR * FIRST_STEP_S)
    assert deadline_s(timing, clock, 16, layers=8) == pytest.approx(STALL_FACTOR * FIRST_STEP_S), "another number of layers"


def test_an_outlier_leaves_the_running_average(timing: StepTiming, clock: Clock) -> None:
    run_step(timing, clock, 4, 1.0)
    run_step(timing, clock, 4, 60.0)
    for _ in range(60):
        run_step(timing, clock, 4, 1.0)
    assert deadline_s(timing, clock, 4) == pytest.approx(STALL_FACTOR * 1.0, rel=0.01)


def test_a_failed_step_is_not_under_way_and_not_counted(timing: StepTiming, clock: Clock) -> None:
    run_step(timing, clock, 4, 1.0)
    timing.begin(plan(4))
    clock.now += 50.0
    assert timing.overdue_s() > 0
    timing.discard()
    assert timing.overdue_s() == 0.0 and deadline_s(timing, clock, 4) == pytest.approx(STALL_FACTOR * 1.0)
