"""What exactness costs: our decoding steps against the same engine freed from the rules that keep a row's bits.

Freed, queries are not padded to eight rows and meet only the keys that exist, not all of their stretch, in any kernel's
layers, the faster counts. The compiled layers know no such rules; where oneDNN's products and torch's attention, freed,
beat them, that is what exactness costs, and where they do not, it is negative.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from bench.engine_sides import Step, timed
from node.engine.kv.blocks import BLOCK_TOKENS
from node.engine.model import attention
from node.engine.model.attention import Segment
from node.engine.model.stage import Stage

SHORT_TOKENS, LONG_TOKENS = 70, 600  # neither fills a stretch of 128
BATCH = 32
CHUNK_TOKENS = 256
MIN_ROUNDS = 3


@contextmanager
def freed() -> Iterator[None]:
    """For decoding steps alone: a prefill would be cut into single tokens."""
    with mock.patch.object(attention, "ROW_QUANTUM", 1), mock.patch.object(attention, "STRETCH", 1):
        yield


class Decoding:
    """BATCH sequences with the same `context` tokens, of which only the first was computed; always the same next step."""

    def __init__(self, stage: Stage, context: int) -> None:
        self._stage, self._context = stage, context
        first = stage.sequence()
        for start in range(0, context, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, context - start)
            stage.forward(0, stage.layers, [Segment(0, count, start, first)], range(start, start + count), ids=[7] * count)
        layers = range(stage.layers)
        pages = [first.page(at, min(BLOCK_TOKENS, context - at), layers) for at in range(0, context, BLOCK_TOKENS)]
        self._caches = [first, *(stage.sequence() for _ in range(BATCH - 1))]
        for cache in self._caches[1:]:
            cache.restore(pages)

    def step(self) -> None:
        segments = [Segment(row, 1, self._context, cache) for row, cache in enumerate(self._caches)]
        positions = [self._context] * BATCH
        self._stage.forward(0, self._stage.layers, segments, positions, ids=[7] * BATCH, logits_at=range(BATCH))


def overhead(exact: Stage, others: dict[str, Stage], context: int, rounds: int, budget_s: float) -> dict[str, Any]:
    """The share by which exactness lengthens a step, in wall time and in CPU time; negative: it costs nothing."""
    own = {} if exact.kernel.compiled and others else {"freed": exact}
    sides = {name: Decoding(stage, context) for name, stage in {"exact": exact, **own, **others}.items()}
    taken: dict[str, list[Step]] = {name: [] for name in sides}
    ends_at = time.monotonic() + budget_s
    for number in range(rounds + 1):
        if number > MIN_ROUNDS and time.monotonic() > ends_at:
            break
        for name, side in sides.items():
            if name == "exact":
                steps = [timed(side.step), timed(side.step)]
            else:
                with freed():
                    steps = [timed(side.step), timed(side.step)]
            if number:
                taken[name].append(steps[1])  # the first finds its memory cold
    wall_s = {name: statistics.median(step.wall_s for step in steps) for name, steps in taken.items()}
    cpu_s = {name: statistics.median(step.cpu_s for step in steps) for name, steps in taken.items()}
    return {
        "wall": round(wall_s["exact"] / min(wall_s[name] for name in wall_s if name != "exact") - 1, 3),
        "cpu": round(cpu_s["exact"] / min(cpu_s[name] for name in cpu_s if name != "exact") - 1, 3),
        "cpu_ms": {name: round(1e3 * each, 1) for name, each in cpu_s.items()},
    }
