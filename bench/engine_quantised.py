"""Whether weights in INT8 and INT4 are worth their bytes: decoding with them against the weights as they are stored.

llama.cpp's Q8_0 and Q4_0 stand beside them, which hold as many bits a weight.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench import llama_side
from bench.engine_rows import ROOM_TOKENS, Effort, interleaved
from bench.engine_sides import Ours, Side, judged_by
from bench.llama_side import LlamaCpp
from mesh.errors import BadRequest
from node.engine.loading import load_stage
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.stage import Stage

BESIDE = {"int8": "q8_0", "int4": "q4_0"}


def measured(directory: Path, stage: Stage, effort: Effort, batches: tuple[int, ...]) -> dict[str, Any]:
    """`quantised`: a row for each batch. `stage` has the weights as they are stored."""
    checkpoint, threads = read_checkpoint(directory), effort.threads
    stages: dict[str, Stage] = {"stored": stage}
    skipped: dict[str, str] = {}
    for quantize in BESIDE:
        try:
            loaded = load_stage(checkpoint, 0, checkpoint.layers, "auto", threads, quantize).stage
        except BadRequest as error:  # no kernel for it here
            skipped[quantize] = str(error)
            continue
        stages[quantize] = loaded
    no_llama = llama_side.absent()
    kinds = [] if no_llama else [kind for quantize, kind in BESIDE.items() if quantize in stages]
    children = {kind: LlamaCpp(llama_side.convert(directory, kind), threads) for kind in kinds}
    try:
        rows = [_row(stages, children, batch, effort) for batch in batches]
    finally:
        for child in children.values():
            child.close()
    kernels = {name: each.kernel.name for name, each in stages.items()}
    return {"quantised": {"rows": rows, "kernels": kernels, "skipped": skipped, "llamacpp": no_llama or "present"}}


def _row(stages: dict[str, Stage], children: dict[str, LlamaCpp], batch: int, effort: Effort) -> dict[str, Any]:
    vocab_size = stages["stored"].checkpoint.vocab_size
    sides: dict[str, Side] = {name: Ours(stage, batch) for name, stage in stages.items()}
    sides |= {kind: child.begin(batch, vocab_size, ROOM_TOKENS) for kind, child in children.items()}
    taken = interleaved(sides, {}, effort.budget_s, lambda: None, effort.rounds)
    of = judged_by(effort.threads).of
    median_s = {name: statistics.median(map(of, steps)) for name, steps in taken.items()}
    row: dict[str, Any] = {"batch": batch}
    for quantize, kind in BESIDE.items():
        if quantize in median_s:
            row[f"{quantize}_vs_stored"] = round(median_s["stored"] / median_s[quantize], 2)
            row[f"{quantize}_vs_{kind}"] = round(median_s[kind] / median_s[quantize], 2) if kind in median_s else None
    cpu_ms = {name: round(1e3 * statistics.median(step.cpu_s for step in steps), 2) for name, steps in taken.items()}
    return {**row, "cpu_ms": cpu_ms}
