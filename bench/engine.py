"""What the built-in engine can do: decoding beside transformers and llama.cpp in one run, and what its parts cost and save.

`python -m bench.engine [--quick] [--threads N] [--budget SECONDS] [--only PART,…] [--isa avx2] [--device D] [--out FILE]`;
the last line is one JSON object. What is asked of a figure stands beside it, and `missed` names all that miss it. With
`--isa avx2` every engine is capped to AVX2 (`bench.capped`). On a GPU it is `bench.engine_gpu` that measures.

The model is Llama-3.2-1B-shaped (`--quick`: 100 million parameters) with random weights stored in bfloat16. Ours is the
stage as the engine runs it, with the kernel that a node would choose here and the exactness rules on. Opponents: the
model's own forward with a DynamicCache and SDPA in whichever of float32 and bfloat16 is faster here, transformers'
`generate_batch` in the same dtype, and llama.cpp on the same weights as FP16 and as BF16, the faster of them; it is
measured where `make bench-peers` has prepared it, else its figures are null and the report says why.

Parts: `products` multiplies beside FBGEMM and oneDNN; `rows` decodes and `prefill` reads a prompt beside the opponents;
`quantised` decodes with INT8 and INT4; `context` is a step behind 16,000 tokens, `sampler` a draw; `exactness` says what
exactness costs; `loading`, `split`, `prefix` and `speculation` are the benchmarks of those names. With one thread sides are
compared by CPU time, with several by wall time; both are told. With --out the file has after each part what is known by
then, and a later run of other parts, of the same commit, shape, threads and cap, adds to it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import (
    engine_context,
    engine_exactness,
    engine_gpu,
    engine_loading,
    engine_prefill,
    engine_prefix,
    engine_products,
    engine_quantised,
    engine_rows,
    engine_sampler,
    engine_speculation,
    engine_split,
)
from bench.capped import ISAS, cap
from bench.engine_goals import judged
from bench.engine_rows import QUICK_ROUNDS, ROUNDS, Effort, say
from bench.engine_shapes import SHAPES, make_checkpoint
from bench.machine import machine
from mesh.errors import BadRequest
from mesh.view import is_exact
from node.engine import device
from node.engine.kernels.machine import named
from node.engine.loading import LoadedStage, load_stage
from node.engine.model.checkpoint import Checkpoint, read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.model.local_stage import LocalStage
from node.engine.model.stage import Stage

QUICK_SHAPE, FULL_SHAPE = "100M", "Llama-3.2-1B"
WITHOUT_MODEL = {"products", "context", "sampler"}  # parts that need no checkpoint
NOT_QUICK = {"quantised", "exactness", "split", "prefix", "speculation"}  # parts that --quick leaves out unless asked for
QUICK_QUANTISED_BATCHES = (1, 8)
SAME = ("shape", "threads", "commit", "capped")  # in a report that others' parts may be added to


def inexact_stages(checkpoint: Checkpoint, loaded: LoadedStage, threads: int) -> dict[str, Stage]:
    """Other products that could serve if nothing had to be exact: oneDNN's reordered weights in the same arithmetic."""
    name = {torch.bfloat16: "onednn-bf16", torch.float32: "onednn-fp32"}[loaded.stage.kernel.dtype]
    if loaded.stage.kernel.name == name:
        return {}
    stage = LocalStage(checkpoint, 0, checkpoint.layers, KERNELS[name], threads)
    try:
        stage.pack()
    except (ValueError, RuntimeError) as error:  # no such kernel on this CPU
        say(skipped=name, reason=str(error))
        return {}
    return {name: stage}


class Bench:
    """One model under measurement; each method is a part, and gives its share of the report."""

    def __init__(self, directory: Path, threads: int, budget_s: float, quick: bool) -> None:
        self._directory = directory
        self._threads = threads
        self._budget_s = budget_s
        self._quick = quick

    @property
    def parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """In the order of running: what loads its own engines comes when the stage is gone."""
        return {
            "products": self.products,
            "context": self.context,
            "sampler": self.sampler,
            "loading": self.loading,
            "rows": self.rows,
            "prefill": self.prefill,
            "quantised": self.quantised,
            "exactness": self.exactness,
            "split": self.split,
            "prefix": self.prefix,
            "speculation": self.speculation,
        }

    @functools.cached_property
    def _loaded(self) -> tuple[Checkpoint, LoadedStage, float]:
        checkpoint = read_checkpoint(self._directory)
        began_s = time.perf_counter()
        loaded = load_stage(checkpoint, 0, checkpoint.layers, "auto", self._threads)
        load_s = time.perf_counter() - began_s
        say(kernel=named(loaded.stage.kernel), load_s=round(load_s, 2))
        return checkpoint, loaded, load_s

    @property
    def _effort(self) -> Effort:
        if self._quick:
            return Effort(self._threads, self._budget_s, QUICK_ROUNDS, generate_batch=False)
        return Effort(self._threads, self._budget_s)

    def products(self) -> dict[str, Any]:
        shapes = [QUICK_SHAPE] if self._quick else [QUICK_SHAPE, FULL_SHAPE]
        ours = engine_products.chosen_here()
        if not self._quick:
            return {"products": engine_products.measure(shapes, ours)}
        names = list(dict.fromkeys((ours, *engine_products.QUANTISED[:2], *engine_products.OPPONENTS)))
        effort = {"rounds": engine_products.QUICK_ROUNDS, "caches": engine_products.QUICK_CACHES}
        return {"products": engine_products.measure(shapes, ours, (), engine_products.QUICK_ROWS, names, **effort)}

    def context(self) -> dict[str, Any]:
        return engine_context.measured(self._threads, rounds=2 if self._quick else 5)

    def sampler(self) -> dict[str, Any]:
        return engine_sampler.measured(rounds=8 if self._quick else 25)

    def loading(self) -> dict[str, Any]:
        peak = engine_loading.measured_apart(self._directory)
        return {"peak_load_ratio": peak["ratio"], "peak_load": peak}

    def prefill(self) -> dict[str, Any]:
        stage = self._loaded[1].stage
        return engine_prefill.measured(self._directory, stage, self._threads, rounds=2, with_llama=not self._quick)

    def quantised(self) -> dict[str, Any]:
        batches = QUICK_QUANTISED_BATCHES if self._quick else engine_rows.BATCHES
        return engine_quantised.measured(self._directory, self._loaded[1].stage, self._effort, batches)

    def rows(self) -> dict[str, Any]:
        _, loaded, load_s = self._loaded
        found = engine_rows.measured(self._directory, loaded.stage, self._effort)
        return {
            **found,
            "exact": found["exact"] and is_exact(loaded.numerics),
            "kernel": loaded.stage.kernel.name,
            "kernel_on": named(loaded.stage.kernel),
            "parameters": loaded.stage.parameters,
            "load_s": round(load_s, 2),
        }

    def exactness(self) -> dict[str, Any]:
        checkpoint, loaded, _ = self._loaded
        others = inexact_stages(checkpoint, loaded, self._threads)
        contexts = {"short": engine_exactness.SHORT_TOKENS, "long": engine_exactness.LONG_TOKENS}
        cost = {
            name: engine_exactness.overhead(loaded.stage, others, tokens, ROUNDS, self._budget_s)
            for name, tokens in contexts.items()
        }
        return {"invariance_overhead": {name: each["wall"] for name, each in cost.items()}, "invariance": cost}

    def split(self) -> dict[str, Any]:
        return self._own("split", "split2_ratio", engine_split.measured, rounds=2 if self._quick else 3)

    def prefix(self) -> dict[str, Any]:
        return self._own("prefix", "prefix_hit_ttft_ratio", engine_prefix.measured, rounds=3)

    def speculation(self) -> dict[str, Any]:
        return self._own("speculation", "spec_speedup_copy_task", engine_speculation.measured, rounds=2 if self._quick else 3)

    def _own(self, part: str, key: str, measured: Callable[[Path, int, int], dict[str, Any]], rounds: int) -> dict[str, Any]:
        """A benchmark that loads engines of its own."""
        self.__dict__.pop("_loaded", None)
        gc.collect()
        found = measured(self._directory, self._threads, rounds)
        return {key: found[key], part: found}


class Report:
    """What is known so far, kept in a file as it comes."""

    def __init__(self, head: dict[str, Any], out: Path | None) -> None:
        self._out = out
        self._known = self._begun(head) | head

    def _begun(self, head: dict[str, Any]) -> dict[str, Any]:
        if self._out is None or not self._out.is_file():
            return {}
        before: dict[str, Any] = json.loads(self._out.read_text())
        return before if all(before.get(name) == head[name] for name in SAME) else {}

    def add(self, figures: dict[str, Any], part: str, took_s: float) -> dict[str, Any]:
        """The whole report with this part's figures."""
        self._known |= figures | {"took_s": {**self._known.get("took_s", {}), part: round(took_s, 1)}}
        whole = judged(self._known)
        if self._out is not None:
            self._out.write_text(json.dumps(whole, indent=2) + "\n")
        return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a model of 100 million parameters, fewer rounds, the usual parts")
    parser.add_argument("--threads", type=int, default=1, help="threads, the same for everyone")
    parser.add_argument("--budget", type=float, help="seconds for the turns of each batch, after the first three rounds")
    parser.add_argument(
        "--only", help="parts, with commas between: products, loading, rows, exactness, split, prefix, speculation"
    )
    parser.add_argument("--isa", choices=ISAS, default="native", help="avx2: everyone is capped to it")
    parser.add_argument("--out", type=Path, help="also write the JSON object here, after each part")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: then beside transformers' generate on that GPU")
    options = parser.parse_args()
    capped = cap(options.isa)
    try:
        on = device.select(options.device)
    except BadRequest as error:
        parser.error(str(error))
    device.configure_precision(on)
    torch.set_num_threads(options.threads)
    shape = QUICK_SHAPE if options.quick else FULL_SHAPE
    budget_s = options.budget or (2.0 if options.quick else 30.0)
    here = machine()
    say(cpu=here["cpu"], isa=here["isa"], load_average=here["load_average"], threads=options.threads, shape=shape)
    isa = f" --isa {options.isa}" if capped else ""
    quick = isa + (" --quick" if options.quick else "") + ("" if on == device.CPU else f" --device {options.device}")
    head = {
        "bench": "engine",
        "command": f"python -m bench.engine{quick} --threads {options.threads}",
        "shape": shape,
        "threads": options.threads,
        "isa": here["isa"],
        "capped": capped,
        "commit": here["commit"],
        "machine": here,
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.threads, budget_s, options.quick)
        usual = [part for part in bench.parts if not (options.quick and part in NOT_QUICK)]
        wanted = options.only.split(",") if options.only else usual
        if unknown := set(wanted) - set(bench.parts):
            parser.error(f"--only: expected some of {', '.join(bench.parts)}; got {', '.join(sorted(unknown))}")
        if on != device.CPU or set(wanted) - WITHOUT_MODEL:
            make_checkpoint(Path(folder), SHAPES[shape])
        report, whole = Report(head, options.out), head
        if on != device.CPU:
            began_s = time.perf_counter()
            whole = report.add(engine_gpu.measure(Path(folder), on), "gpu", time.perf_counter() - began_s)
            wanted = []
        for part in (part for part in bench.parts if part in wanted):
            began_s = time.perf_counter()
            figures = bench.parts[part]()
            whole = report.add(figures, part, time.perf_counter() - began_s)
            say(part=part, took_s=whole["took_s"][part], **figures)
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
