"""What a long context costs: a decoding step behind 16,000 tokens against one behind 64, of the same model.

The model has four layers with eight query heads on two heads of 64 for keys and values, and so few weights that what is kept
of the context weighs. Nothing is computed of the 16,000 tokens: what the first 64 left is repeated.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.engine_shapes import make_checkpoint
from bench.engine_sides import Step, judged_by, timed
from node.engine.kernels.machine import named
from node.engine.loading import load_stage
from node.engine.model.attention import Segment
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.local_stage import LocalStage
from node.engine.model.stage import Stage

NEAR_TOKENS, FAR_TOKENS = 64, 16_000
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": False,
}


class Behind:
    """A sequence of so many tokens; always the same next step."""

    def __init__(self, stage: Stage, tokens: int) -> None:
        self._stage, self._tokens = stage, tokens
        first = stage.sequence()
        ids = list(range(NEAR_TOKENS))
        stage.forward(0, stage.layers, [Segment(0, len(ids), 0, first)], range(len(ids)), ids=ids)
        page = first.page(0, NEAR_TOKENS, range(stage.layers))
        self._sequence = stage.sequence()
        self._sequence.restore([page] * (tokens // NEAR_TOKENS))

    def step(self) -> None:
        here = self._tokens
        self._stage.forward(0, self._stage.layers, [Segment(0, 1, here, self._sequence)], [here], ids=[7], logits_at=[0])


def measured(threads: int, rounds: int, steps: int = 8, far_tokens: int = FAR_TOKENS, wanted: str = "auto") -> dict[str, Any]:
    """`context_step_ratio`, and in `context` what it is made of."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), SHAPE)
        checkpoint = read_checkpoint(Path(folder))
        stage = load_stage(checkpoint, 0, checkpoint.layers, wanted, threads).stage
        assert isinstance(stage, LocalStage)
        sides = {tokens: Behind(stage, tokens) for tokens in (NEAR_TOKENS, far_tokens)}
        taken: dict[int, list[Step]] = {tokens: [] for tokens in sides}
        for number in range(rounds + 1):
            for tokens, side in sides.items():
                turn = [timed(side.step) for _ in range(steps)][1:]
                taken[tokens] += turn if number else []
    of = judged_by(threads).of
    median_s = {tokens: statistics.median(map(of, each)) for tokens, each in taken.items()}
    keys_and_values = 2 * stage.layers * SHAPE["num_key_value_heads"] * 64 * stage.kernel.dtype.itemsize * far_tokens
    spent_s = median_s[far_tokens] - median_s[NEAR_TOKENS]
    return {
        "context_step_ratio": round(median_s[far_tokens] / median_s[NEAR_TOKENS], 2),
        "context": {
            "kernel_on": named(stage.kernel),
            "cpu_ms": {tokens: round(1e3 * statistics.median(step.cpu_s for step in each), 2) for tokens, each in taken.items()},
            "ms": {tokens: round(1e3 * statistics.median(step.wall_s for step in each), 2) for tokens, each in taken.items()},
            "keys_and_values_mib": round(keys_and_values / 2**20, 1),
            "keys_and_values_gb_s": round(keys_and_values / spent_s / 1e9, 1) if spent_s > 0 else None,
        },
    }
