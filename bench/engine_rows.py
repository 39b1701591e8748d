"""The rows of bench.engine's report: how fast we decode a batch, and everyone else beside us, taking turns.

Everyone has the same threads, reads the same prompts and takes the largest logit. Nobody's first step of a turn counts:
memory is cold.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import llama_side
from bench.bandwidth import MemoryReader
from bench.engine_shapes import PROMPT_TOKENS, weights_read_bytes
from bench.engine_sides import ForwardLoop, GenerateBatch, Ours, Side, Step, best_dtypes, plain_model
from bench.llama_side import LlamaCpp
from node.engine.stage import Stage

BATCHES = (1, 8, 32)
ROUNDS = 12
LEAST_ROUNDS = 3
STEPS = 5  # a turn, of which the first does not count
CONTINUOUS_ROUNDS = 2  # of generate_batch, which reads its prompts anew in each
TRIAL_STEPS = 3
ROOM_TOKENS = PROMPT_TOKENS + (ROUNDS + 2) * STEPS
KINDS = ("f16", "bf16")


@dataclass
class Opponents:
    """Who is measured beside us: the dtypes that suit transformers, and llama.cpp's children by the kind of their weights."""

    dtypes: dict[int, torch.dtype]
    models: dict[torch.dtype, Any]
    llama: dict[str, LlamaCpp]


def say(**what: Any) -> None:
    print(json.dumps(what), file=sys.stderr, flush=True)


def interleaved(
    sides: dict[str, Side], rare: dict[str, Side], budget_s: float, each_round: Callable[[], Any]
) -> dict[str, list[Step]]:
    """Turns of STEPS steps, round by round until ROUNDS or the budget is used up; `rare` sides take part in the first rounds."""
    taken: dict[str, list[Step]] = {name: [] for name in (*sides, *rare)}
    ends_at = time.monotonic() + budget_s
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() > ends_at:
            break
        each_round()
        for name, side in sides.items():
            taken[name] += side.turn(STEPS)[1:]
        if number < CONTINUOUS_ROUNDS:
            for name, side in rare.items():
                taken[name] += side.turn(STEPS)
    return taken


def row(stage: Stage, ours: Ours, opponents: Opponents, batch: int, budget_s: float, reader: MemoryReader) -> dict[str, Any]:
    """One row of the report; each figure comes from the median step. CPU time stays comparable on a busy machine."""
    model = opponents.models[opponents.dtypes[batch]]
    plain = ForwardLoop(model, batch)
    children = {kind: child.begin(batch, stage.checkpoint.vocab_size, ROOM_TOKENS) for kind, child in opponents.llama.items()}
    sides: dict[str, Side] = {"ours": ours, "hf": plain, **children}
    read_gb_s: list[float] = []
    taken = interleaved(
        sides, {"generate_batch": GenerateBatch(model, batch)}, budget_s, lambda: read_gb_s.append(reader.measure())
    )
    wall_s = {name: statistics.median(step.wall_s for step in steps) for name, steps in taken.items()}
    cpu_s = {name: statistics.median(step.cpu_s for step in steps) for name, steps in taken.items()}
    llama = min(children, key=lambda kind: wall_s[kind], default="")
    per_s = {name: batch / median for name, median in wall_s.items()}
    weight_bytes = 2 if stage.kernel.compiled else stage.kernel.dtype.itemsize
    achieved = weights_read_bytes(stage.checkpoint.config, weight_bytes) / wall_s["ours"] / 1e9
    return {
        "batch": batch,
        "ours_tok_s": round(per_s["ours"], 1),
        "hf_tok_s": round(per_s["hf"], 1),
        "generate_batch_tok_s": round(per_s["generate_batch"], 1),
        "llamacpp_tok_s": round(per_s[llama], 1) if llama else None,
        "vs_hf": round(per_s["ours"] / per_s["hf"], 2),
        "vs_generate_batch": round(per_s["ours"] / per_s["generate_batch"], 2),
        "vs_llamacpp": round(per_s["ours"] / per_s[llama], 2) if llama else None,
        "bandwidth_fraction": round(achieved / statistics.median(read_gb_s), 2),
        "weights_gb_s": round(achieved, 1),
        "memory_gb_s": round(statistics.median(read_gb_s), 1),
        "vs_hf_cpu_time": round(cpu_s["hf"] / cpu_s["ours"], 2),
        "vs_llamacpp_cpu_time": round(cpu_s[llama] / cpu_s["ours"], 2) if llama else None,
        "hf_dtype": str(opponents.dtypes[batch]).removeprefix("torch."),
        "llamacpp_weights": llama or None,
        "llamacpp_first_tokens_equal": sum(map(int.__eq__, children[llama].first, plain.first)) if llama else None,
        "steps": len(taken["ours"]),
        "step_ms": {name: round(1e3 * each, 2) for name, each in wall_s.items()},
        "cpu_ms": {name: round(1e3 * each, 2) for name, each in cpu_s.items() if not math.isnan(each)},
        "best_ms": {name: round(1e3 * min(step.wall_s for step in steps), 2) for name, steps in taken.items()},
    }


def same_bits(batches: list[Ours]) -> bool:
    """Whether row 0's logits are bit-equal in every batch, at every step that several took."""
    return all(len(set(said)) == 1 for said in zip(*(each.said for each in batches)))


def measured(directory: Path, stage: Stage, threads: int, budget_s: float) -> dict[str, Any]:
    """`rows`, whether our bits are the `exact` same in every batch, and what llama.cpp said of itself."""
    no_llama = llama_side.absent()
    dtypes = best_dtypes(directory, BATCHES, TRIAL_STEPS)
    say(dtypes={batch: str(dtype) for batch, dtype in dtypes.items()}, llamacpp=no_llama or "present")
    models = {dtype: plain_model(directory, dtype) for dtype in set(dtypes.values())}
    llama = {} if no_llama else {kind: LlamaCpp(llama_side.convert(directory, kind), threads) for kind in KINDS}
    reader = MemoryReader(threads)
    rows, batches = [], []
    try:
        for batch in BATCHES:
            batches.append(Ours(stage, batch))
            rows.append(row(stage, batches[-1], Opponents(dtypes, models, llama), batch, budget_s, reader))
            say(**rows[-1])
        about = {kind: child.about for kind, child in llama.items()}
    finally:
        reader.close()
        for child in llama.values():
            child.close()
    return {
        "rows": rows,
        "exact": same_bits(batches),
        "llamacpp": about.get(rows[0]["llamacpp_weights"]) or {"absent": no_llama},
    }
