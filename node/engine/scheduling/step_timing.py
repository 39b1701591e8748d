"""How long steps take: what the load report says of it, and when a step hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

from node.engine.scheduling.step_plan import StepPlan

STALL_FACTOR = 4.0  # a step that takes so many times what steps of its size take on the average hangs
STALL_AFTER_S = 1.0  # but none that is shorter: a loaded machine takes threads away for that long
FIRST_STEP_S = 2.5  # what the first step of a size is taken to need, or more if smaller ones say so: it may page weights in
AVERAGING = 0.2  # weight of the newest step in the running averages


class StepTiming:
    """Written by the engine thread; single figures are read by others."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.prefill_tok_s = self.step_ms = 0.0
        self.prefill_tokens = self.decode_tokens = 0
        self._under_way: tuple[float, float] | None = None  # when the step began, and how long it may take
        self._average_s: dict[tuple[int, int], float] = {}  # of steps by layers and size, which is a power of two of rows

    def begin(self, plan: StepPlan) -> None:
        self._under_way = self._clock(), max(STALL_AFTER_S, STALL_FACTOR * self._expected_s(*_size(plan)))

    def _expected_s(self, layers: int, size: int) -> float:
        """The average of such steps. Where there was none, as if every row of the largest known had taken its time."""
        known = self._average_s.get((layers, size))
        if known is not None:
            return known
        smaller = [other for of, other in self._average_s if of == layers and other < size]
        if not smaller:
            return FIRST_STEP_S
        return max(FIRST_STEP_S, self._average_s[layers, max(smaller)] * 2.0 ** (size - max(smaller)))

    def give_up(self) -> None:
        """Nothing came of the step: its time says nothing."""
        self._under_way = None

    def end(self, plan: StepPlan) -> float:
        """The seconds that the step took."""
        assert self._under_way is not None
        took_s, self._under_way = self._clock() - self._under_way[0], None
        before_s = self._average_s.get(_size(plan), took_s)
        self._average_s[_size(plan)] = before_s + (took_s - before_s) * AVERAGING
        rows = sum(max(1, chunk.count - len(chunk.draft)) for chunk in plan.chunks)
        decodes = sum(chunk.count - len(chunk.draft) <= 1 for chunk in plan.chunks)
        self.decode_tokens += decodes
        self.prefill_tokens += rows - decodes
        if decodes == rows:
            self.step_ms += (took_s * 1e3 - self.step_ms) * (AVERAGING if self.step_ms else 1.0)
        elif rows > 2 * decodes:
            rate = (rows - decodes) / took_s
            self.prefill_tok_s += (rate - self.prefill_tok_s) * (AVERAGING if self.prefill_tok_s else 1.0)
        return took_s

    def overdue_s(self) -> float:
        """How long the step under way is past its deadline; 0 at rest."""
        under_way = self._under_way
        if under_way is None:
            return 0.0
        began_s, may_take_s = under_way
        return max(0.0, self._clock() - began_s - may_take_s)


def _size(plan: StepPlan) -> tuple[int, int]:
    """The layers of a step, and its rows as a power of two."""
    assert plan.lane is not None
    rows = sum(chunk.count for chunk in plan.chunks)
    return plan.lane.end - plan.lane.start, (rows - 1).bit_length()
