"""Decode speed of the stage on a GPU against transformers' `generate` there: `python -m bench.engine --device cuda`.

Ours is the stage as the engine runs it, with the attention that passed the self-check, decoding steps recorded.
`generate` is timed twice, for one new token and for some more, so that reading the prompts cancels out. Random weights of
the same checkpoint in its stored dtype, the same prompts, the largest logit. It runs on a CPU as well, for its test.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from bench.engine_shapes import prompts
from bench.engine_sides import Ours, plain_model
from mesh.view import is_exact
from node.engine import device
from node.engine.kernels.machine import named
from node.engine.loading import load_stage
from node.engine.model.checkpoint import read_checkpoint

BATCHES = (1, 64)
ROUNDS = 5
STEPS = 16  # a turn, of which ours does not count the first


def generate_step_s(model: Any, batch: int, steps: int) -> float:
    """Seconds of one decoding step of `generate`."""
    given = torch.tensor(prompts(batch, model.config.vocab_size), device=model.device)
    mask = torch.ones_like(given)
    took_s = []
    for new in (1, 1 + steps):
        own = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        began_s = time.perf_counter()
        model.generate(given, attention_mask=mask, generation_config=own).tolist()  # which waits for the device
        took_s.append(time.perf_counter() - began_s)
    return (took_s[1] - took_s[0]) / steps


def measure(
    directory: Path,
    on: torch.device,
    batches: tuple[int, ...] = BATCHES,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, Any]:
    """All figures on the checkpoint in `directory`; sides take turns, and the median turn counts."""
    checkpoint = read_checkpoint(directory)
    loaded = load_stage(checkpoint, 0, checkpoint.layers, "auto", torch.get_num_threads(), on=on)
    model = plain_model(directory, checkpoint.stored_dtype).to(on)
    rows, sides = [], []
    for batch in batches:
        ours = Ours(loaded.stage, batch)
        sides.append(ours)
        ours_s, theirs_s = [], []
        for _ in range(rounds):
            ours_s += [step.wall_s for step in ours.turn(steps)[1:]]
            theirs_s.append(generate_step_s(model, batch, steps))
        step_s = statistics.median(ours_s), statistics.median(theirs_s)
        rows.append(
            {
                "batch": batch,
                "ours_tok_s": round(batch / step_s[0], 1),
                "hf_generate_tok_s": round(batch / step_s[1], 1),
                "vs_hf_generate": round(step_s[1] / step_s[0], 2),
                "step_ms": {"ours": round(1e3 * step_s[0], 3), "hf_generate": round(1e3 * step_s[1], 3)},
            }
        )
    recorded = getattr(loaded.stage, "recorded", None)
    return {
        "rows": rows,
        "exact": is_exact(loaded.numerics) and all(len(set(said)) == 1 for said in zip(*(side.said for side in sides))),
        "kernel": loaded.stage.kernel.name,
        "kernel_on": named(loaded.stage.kernel),
        "parameters": loaded.stage.parameters,
        "device": device.name(on) or "cpu",
        "recorded_steps": 0 if recorded is None else len(recorded),
    }
