"""Measures how long steps take, for the load report, and detects a step that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

from node.engine.scheduling.sequence import StepPlan

STALL_FACTOR = 4.0  # a step hangs when it takes so many times the average of steps of its size
STALL_AFTER_S = 1.0  # but no step hangs before this: on a loaded machine a thread may not run for that long
FIRST_STEP_S = 2.5  # the least assumed for the first step of a size, which may read weights from disk
AVERAGING = 0.2  # weight of the newest step in the running averages


class StepTiming:
    """Written by the engine thread; other threads read single figures."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.prefill_tok_s = self.step_ms = 0.0
        self.prefill_tokens = self.decode_tokens = 0
        self._under_way: tuple[float, float] | None = None  # when the step began, and how long it may take, in seconds
        self._average_s: dict[tuple[int, int], float] = {}  # by `_size`

    def begin(self, plan: StepPlan) -> None:
        self._under_way = self._clock(), max(STALL_AFTER_S, STALL_FACTOR * self._expected_s(*_size(plan)))

    def _expected_s(self, layers: int, exponent: int) -> float:
        """Returns the average time of such steps; for a new size the time of the next smaller size, scaled by the rows."""
        average_s = self._average_s.get((layers, exponent))
        if average_s is not None:
            return average_s
        smaller = [other for of_layers, other in self._average_s if of_layers == layers and other < exponent]
        if not smaller:
            return FIRST_STEP_S
        row_ratio = float(2 ** (exponent - max(smaller)))
        return max(FIRST_STEP_S, self._average_s[layers, max(smaller)] * row_ratio)

    def discard(self) -> None:
        """Forgets the step under way: it had no result, so its time is not counted."""
        self._under_way = None

    def end(self, plan: StepPlan) -> float:
        """Counts the step under way and returns the seconds that it took."""
        assert self._under_way is not None
        took_s, self._under_way = self._clock() - self._under_way[0], None
        before_s = self._average_s.get(_size(plan), took_s)
        self._average_s[_size(plan)] = before_s + (took_s - before_s) * AVERAGING
        # Guessed positions are left out: they are extra work, neither prompt tokens nor certain to become answer tokens.
        rows = sum(max(1, chunk.count - len(chunk.draft)) for chunk in plan.chunks)
        decodes = sum(chunk.count - len(chunk.draft) <= 1 for chunk in plan.chunks)
        assert 0 <= decodes <= rows
        self.decode_tokens += decodes
        self.prefill_tokens += rows - decodes
        # A mixed step is counted as a prefill only where prefill is most of the work.
        if decodes == rows:
            self.step_ms += (took_s * 1e3 - self.step_ms) * (AVERAGING if self.step_ms else 1.0)
        elif rows > 2 * decodes:
            rate = (rows - decodes) / took_s
            self.prefill_tok_s += (rate - self.prefill_tok_s) * (AVERAGING if self.prefill_tok_s else 1.0)
        return took_s

    def overdue_s(self) -> float:
        """Returns for how long the step under way has been past its deadline, in seconds; 0 where it is not, or no step runs."""
        under_way = self._under_way  # read once: the engine thread may replace it meanwhile
        if under_way is None:
            return 0.0
        began_s, may_take_s = under_way
        return max(0.0, self._clock() - began_s - may_take_s)


def _size(plan: StepPlan) -> tuple[int, int]:
    """Returns the layers of a step, and the power of two up to which its rows are rounded."""
    assert plan.lane is not None
    rows = sum(chunk.count for chunk in plan.chunks)
    return plan.lane.end - plan.lane.start, (rows - 1).bit_length()
