"""Decode speed of the built-in engine against transformers and llama.cpp, in one run, taking turns.

`python -m bench.engine [--quick] [--threads N] [--budget SECONDS] [--out FILE]`; the last line is one JSON object.

The model is Llama-3.2-1B-shaped (`--quick`: 100 million parameters) with random weights stored in bfloat16. Ours is the
stage as the engine runs it, with the kernel that a node would choose here and the exactness rules on. Opponents: the
model's own forward with a DynamicCache and SDPA in whichever of float32 and bfloat16 is faster here, transformers'
`generate_batch` in the same dtype, and llama.cpp on the same weights as FP16 and as BF16, the faster of them; it is
measured where `make bench-peers` has prepared it, else its figures are null and the report says why. Everyone has the
same threads, reads the same prompts and takes the largest logit. Nobody's first step of a turn counts: memory is cold.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import engine_exactness, engine_loading, llama_side
from bench.bandwidth import MemoryReader
from bench.engine_shapes import PROMPT_TOKENS, SHAPES, make_checkpoint, weights_read_bytes
from bench.engine_sides import ForwardLoop, GenerateBatch, Ours, Side, Step, best_dtypes, plain_model
from bench.llama_side import LlamaCpp
from bench.machine import machine
from mesh.view import is_exact
from node.engine.checkpoint import Checkpoint, read_checkpoint
from node.engine.linear import KERNELS
from node.engine.loading import Loaded, load_stage
from node.engine.machine import named
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


def inexact_stages(checkpoint: Checkpoint, loaded: Loaded, threads: int) -> dict[str, Stage]:
    """Other products that could serve if nothing had to be exact: oneDNN's reordered weights in the same arithmetic."""
    name = {torch.bfloat16: "onednn-bf16", torch.float32: "onednn-fp32"}[loaded.stage.kernel.dtype]
    if loaded.stage.kernel.name == name:
        return {}
    stage = Stage(checkpoint, 0, checkpoint.layers, KERNELS[name], threads)
    try:
        stage.pack()
    except (ValueError, RuntimeError) as error:  # no such kernel on this CPU
        say(skipped=name, reason=str(error))
        return {}
    return {name: stage}


def same_bits(batches: list[Ours]) -> bool:
    """Whether row 0's logits are bit-equal in every batch, at every step that several took."""
    return all(len(set(said)) == 1 for said in zip(*(each.said for each in batches)))


def measure(directory: Path, threads: int, budget_s: float) -> dict[str, Any]:
    """All figures on the checkpoint in `directory`."""
    checkpoint = read_checkpoint(directory)
    peak = engine_loading.measured_apart(directory)
    say(peak_load=peak)
    no_llama = llama_side.absent()
    dtypes = best_dtypes(directory, BATCHES, TRIAL_STEPS)
    began_s = time.perf_counter()
    loaded = load_stage(checkpoint, 0, checkpoint.layers, "auto", threads)
    load_s = time.perf_counter() - began_s
    say(dtypes={batch: str(dtype) for batch, dtype in dtypes.items()})
    say(kernel=named(loaded.stage.kernel), load_s=round(load_s, 2), llamacpp=no_llama or "present")
    models = {dtype: plain_model(directory, dtype) for dtype in set(dtypes.values())}
    llama = {} if no_llama else {kind: LlamaCpp(llama_side.convert(directory, kind), threads) for kind in KINDS}
    reader = MemoryReader(threads)
    rows, batches = [], []
    try:
        for batch in BATCHES:
            batches.append(Ours(loaded.stage, batch))
            rows.append(row(loaded.stage, batches[-1], Opponents(dtypes, models, llama), batch, budget_s, reader))
            say(**rows[-1])
        about = {kind: child.about for kind, child in llama.items()}
    finally:
        reader.close()
        for child in llama.values():
            child.close()
    exact = same_bits(batches)
    batches.clear()
    models.clear()
    gc.collect()
    others = inexact_stages(checkpoint, loaded, threads)
    contexts = {"short": engine_exactness.SHORT_TOKENS, "long": engine_exactness.LONG_TOKENS}
    cost = {name: engine_exactness.overhead(loaded.stage, others, tokens, ROUNDS, budget_s) for name, tokens in contexts.items()}
    return {
        "rows": rows,
        "invariance_overhead": {name: each["wall"] for name, each in cost.items()},
        "peak_load_ratio": peak["ratio"],
        "exact": exact and is_exact(loaded.numerics),
        "kernel": loaded.stage.kernel.name,
        "kernel_on": named(loaded.stage.kernel),
        "parameters": loaded.stage.parameters,
        "load_s": round(load_s, 2),
        "invariance": cost,
        "peak_load": peak,
        "llamacpp": about.get(rows[0]["llamacpp_weights"]) or {"absent": no_llama},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a model of 100 million parameters: some two minutes")
    parser.add_argument("--threads", type=int, default=1, help="threads, the same for everyone")
    parser.add_argument("--budget", type=float, help="seconds for the turns of each batch, after the first three rounds")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = "100M" if options.quick else "Llama-3.2-1B"
    budget_s = options.budget or (10.0 if options.quick else 30.0)
    here = machine()
    say(cpu=here["cpu"], isa=here["isa"], load_average=here["load_average"], threads=options.threads, shape=shape)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), SHAPES[shape])
        figures = measure(Path(folder), options.threads, budget_s)
    quick = " --quick" if options.quick else ""
    report = {
        "bench": "engine",
        "command": f"python -m bench.engine{quick} --threads {options.threads}",
        "shape": shape,
        "threads": options.threads,
        "isa": here["isa"],
        **figures,
        "machine": here,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
