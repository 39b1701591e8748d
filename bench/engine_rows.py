"""The rows of bench.engine's report: how fast we decode a batch, and the opponents beside us, taking turns.

All sides have the same threads, read the same prompts and take the largest logit. The first step of a turn does not count:
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
from bench.engine_sides import ForwardLoop, GenerateBatch, Ours, Side, Step, best_dtypes, faster, judged_by, plain_model
from bench.llama_side import LlamaCpp
from node.engine.model.stage import Stage

BATCHES = (1, 8, 32)
ROUNDS, QUICK_ROUNDS = 12, 4
MIN_ROUNDS = 2
STEPS = 5  # a turn, of which the first does not count
CONTINUOUS_ROUNDS = 2  # of generate_batch, which reads its prompts anew in each
TRIAL_STEPS = 2
ROOM_TOKENS = PROMPT_TOKENS + (ROUNDS + 2) * STEPS
KINDS = ("f16", "bf16")


@dataclass
class Opponents:
    """What is measured beside us: the dtypes that suit transformers, and llama.cpp's children by the kind of their weights."""

    dtypes: dict[int, torch.dtype]
    models: dict[torch.dtype, Any]
    llama: dict[str, LlamaCpp]


@dataclass(frozen=True)
class Effort:
    """How much is measured. `budget_s`: of each batch, after the first rounds."""

    threads: int
    budget_s: float
    rounds: int = ROUNDS
    generate_batch: bool = True


def say(**what: Any) -> None:
    print(json.dumps(what), file=sys.stderr, flush=True)


def interleaved(
    sides: dict[str, Side], rare: dict[str, Side], budget_s: float, each_round: Callable[[], Any], rounds: int
) -> dict[str, list[Step]]:
    """Turns of STEPS steps, round by round until the budget is used up; `rare` sides take part in the first rounds."""
    taken: dict[str, list[Step]] = {name: [] for name in (*sides, *rare)}
    ends_at = time.monotonic() + budget_s
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.monotonic() > ends_at:
            break
        each_round()
        for name, side in sides.items():
            taken[name] += side.turn(STEPS)[1:]
        if number < CONTINUOUS_ROUNDS:
            for name, side in rare.items():
                taken[name] += side.turn(STEPS)
    return taken


def row(stage: Stage, ours: Ours, opponents: Opponents, batch: int, effort: Effort, reader: MemoryReader) -> dict[str, Any]:
    """One row of the report; each figure comes from the median step, in wall time and in CPU time."""
    model = opponents.models[opponents.dtypes[batch]]
    plain = ForwardLoop(model, batch)
    children = {kind: child.begin(batch, stage.checkpoint.vocab_size, ROOM_TOKENS) for kind, child in opponents.llama.items()}
    sides: dict[str, Side] = {"ours": ours, "hf": plain, **children}
    rare: dict[str, Side] = {"generate_batch": GenerateBatch(model, batch)} if effort.generate_batch else {}
    read_gb_s: list[float] = []
    taken = interleaved(sides, rare, effort.budget_s, lambda: read_gb_s.append(reader.measure()), effort.rounds)
    wall_s = {name: statistics.median(step.wall_s for step in steps) for name, steps in taken.items()}
    cpu_s = {name: statistics.median(step.cpu_s for step in steps) for name, steps in taken.items()}
    llama = faster({kind: taken[kind] for kind in children}, effort.threads)
    weight_bytes = 2 if stage.kernel.compiled else stage.kernel.dtype.itemsize
    achieved = weights_read_bytes(stage.checkpoint.config, weight_bytes) / wall_s["ours"] / 1e9
    return {
        "batch": batch,
        "ours_tok_s": round(batch / wall_s["ours"], 1),
        **{f"{name}_tok_s": _or_none(batch, wall_s.get(name), 1) for name in ("hf", "generate_batch")},
        "llamacpp_tok_s": _or_none(batch, wall_s.get(llama), 1),
        **{f"vs_{name}": _or_none(wall_s.get(name), wall_s["ours"]) for name in ("hf", "generate_batch")},
        "vs_llamacpp": _or_none(wall_s.get(llama), wall_s["ours"]),
        "vs_hf_cpu_time": _or_none(cpu_s["hf"], cpu_s["ours"]),
        "vs_llamacpp_cpu_time": _or_none(cpu_s.get(llama), cpu_s["ours"]),
        "bandwidth_fraction": round(achieved / statistics.median(read_gb_s), 2),
        "weights_gb_s": round(achieved, 1),
        "memory_gb_s": round(statistics.median(read_gb_s), 1),
        "hf_dtype": str(opponents.dtypes[batch]).removeprefix("torch."),
        "llamacpp_weights": llama or None,
        "llamacpp_first_tokens_equal": sum(map(int.__eq__, children[llama].first, plain.first)) if llama else None,
        "steps": len(taken["ours"]),
        "step_ms": {name: round(1e3 * each, 2) for name, each in wall_s.items()},
        "cpu_ms": {name: round(1e3 * each, 2) for name, each in cpu_s.items() if not math.isnan(each)},
        "best_ms": {name: round(1e3 * min(step.wall_s for step in steps), 2) for name, steps in taken.items()},
    }


def _or_none(over: float | None, under: float | None, digits: int = 2) -> float | None:
    """The quotient, or None where a side was not measured."""
    return None if over is None or under is None else round(over / under, digits)


def same_bits(batches: list[Ours]) -> bool:
    """Whether row 0's logits are bit-equal in every batch, at every step that several took."""
    return all(len(set(said)) == 1 for said in zip(*(each.said for each in batches)))


def measured(directory: Path, stage: Stage, effort: Effort) -> dict[str, Any]:
    """`rows`, whether our bits are the `exact` same in every batch, and what llama.cpp said of itself."""
    no_llama = llama_side.absent()
    dtypes = best_dtypes(directory, BATCHES, TRIAL_STEPS, effort.threads)
    say(dtypes={batch: str(dtype) for batch, dtype in dtypes.items()}, llamacpp=no_llama or "present")
    models = {dtype: plain_model(directory, dtype) for dtype in set(dtypes.values())}
    llama = {} if no_llama else {kind: LlamaCpp(llama_side.convert(directory, kind), effort.threads) for kind in KINDS}
    reader = MemoryReader(effort.threads)
    rows, batches = [], []
    try:
        for batch in BATCHES:
            batches.append(Ours(stage, batch))
            rows.append(row(stage, batches[-1], Opponents(dtypes, models, llama), batch, effort, reader))
            say(**rows[-1])
        about = {kind: child.about for kind, child in llama.items()}
    finally:
        reader.close()
        for child in llama.values():
            child.close()
    return {
        "rows": rows,
        "judged_by": judged_by(effort.threads).name,
        "exact": same_bits(batches),
        "llamacpp": about.get(rows[0]["llamacpp_weights"]) or {"absent": no_llama},
    }
