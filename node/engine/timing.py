"""How long steps take: what the load report says of it, and when a step hangs."""

from __future__ import annotations

import time

from node.engine.rows import StepPlan

STALL_AFTER_S = 1.0  # a step that takes longer, and STALL_FACTOR times the longest of late, hangs
STALL_FACTOR = 4.0
FIRST_STEP_S = 2.5  # taken for the longest until there was one: a first step may page weights in
LONGEST_FADES = 0.98  # a step, so that one outlier does not excuse stalls for ever
AVERAGING = 0.2  # weight of the newest step in the running averages


class StepTiming:
    """Written by the engine thread; single figures are read by others."""

    def __init__(self) -> None:
        self.prefill_tok_s = self.step_ms = 0.0
        self.prefill_tokens = self.decode_tokens = 0
        self._began_s: float | None = None  # of the step under way, by perf_counter
        self._longest_s = FIRST_STEP_S

    def begin(self) -> None:
        self._began_s = time.perf_counter()

    def give_up(self) -> None:
        """Nothing came of the step: its time says nothing."""
        self._began_s = None

    def end(self, plan: StepPlan) -> float:
        """The seconds that the step took."""
        assert self._began_s is not None
        took_s, self._began_s = time.perf_counter() - self._began_s, None
        known_s = 0.0 if self._longest_s == FIRST_STEP_S else self._longest_s * LONGEST_FADES
        self._longest_s = max(took_s, known_s)
        rows = sum(max(1, piece.count - len(piece.draft)) for piece in plan.pieces)
        decodes = sum(piece.count - len(piece.draft) <= 1 for piece in plan.pieces)
        self.decode_tokens += decodes
        self.prefill_tokens += rows - decodes
        if decodes == rows:
            self.step_ms += (took_s * 1e3 - self.step_ms) * (AVERAGING if self.step_ms else 1.0)
        elif rows > 2 * decodes:
            rate = (rows - decodes) / took_s
            self.prefill_tok_s += (rate - self.prefill_tok_s) * (AVERAGING if self.prefill_tok_s else 1.0)
        return took_s

    def overdue_s(self) -> float:
        """How long the step under way is past all that earlier ones explain."""
        began_s = self._began_s
        if began_s is None:
            return 0.0
        return max(0.0, time.perf_counter() - began_s - max(STALL_AFTER_S, STALL_FACTOR * self._longest_s))
