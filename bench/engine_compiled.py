"""What the compiled kernel is worth: CPU time with it and without, on this machine as it is and capped to AVX2.

`python -m bench.engine_compiled [--rounds N]`; the last line is one JSON object. The model is the 100M shape of
bench.engine_shapes in bfloat16, one thread; each way of computing runs in a process of its own, and they take turns. A
figure is the least of all rounds, for whatever else the machine does only adds to it. With an empty PATH and the package
ziglang beside this one the kernel is built by that: `PATH= .venv/bin/python -m bench.engine_compiled`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.capped import ENVIRONMENT, cap_fbgemm
from bench.engine_prefill import PROMPT_TOKENS, prompt, read_by_us
from bench.engine_shapes import SHAPES, make_checkpoint
from bench.engine_sides import Ours, timed
from bench.machine import machine
from node.engine.kernels.machine import named
from node.engine.loading import load_stage
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.local_stage import LocalStage
from node.host.environment import CPU_ISA_VARIABLE

SHAPE = "100M"
BATCHES = (1, 8, 32)
STEPS = 6  # of each batch, of which the first does not count
ROUNDS = 3
CHILD_WITHIN_S = 300.0
NONE = {CPU_ISA_VARIABLE: "none"}
WAYS: dict[str, dict[str, str]] = {
    "compiled": {},
    "not compiled": NONE,
    "compiled, AVX2": ENVIRONMENT,
    "not compiled, AVX2": {**ENVIRONMENT, **NONE},
}


def measured_here(directory: Path) -> dict[str, Any]:
    """CPU milliseconds of a decoding step of each batch, and of reading a prompt, with the kernel that a node would choose."""
    torch.set_num_threads(1)
    checkpoint = read_checkpoint(directory)
    stage = load_stage(checkpoint, 0, checkpoint.layers, "auto", 1).stage
    assert isinstance(stage, LocalStage)
    found: dict[str, Any] = {"kernel": named(stage.kernel)}
    for batch in BATCHES:
        found[f"step_ms, batch {batch}"] = 1e3 * min(step.cpu_s for step in Ours(stage, batch).turn(STEPS)[1:])
    ids = prompt(checkpoint.vocab_size, PROMPT_TOKENS)
    found[f"prompt_ms, {PROMPT_TOKENS} tokens"] = 1e3 * min(timed(lambda: read_by_us(stage, ids)).cpu_s for _ in range(2))
    return found


def in_a_child(directory: Path, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.engine_compiled", "--child", str(directory)]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=CHILD_WITHIN_S,
        cwd=Path(__file__).parent.parent,
    )
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def least(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of each figure; the kernels that computed them."""
    figures = {name: round(min(each[name] for each in rounds), 1) for name in rounds[0] if name != "kernel"}
    return {"kernel": ", ".join(sorted({each["kernel"] for each in rounds})), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", type=Path)
    given = parser.parse_args()
    if given.child is not None:
        if os.environ.get("ATEN_CPU_CAPABILITY") == ENVIRONMENT["ATEN_CPU_CAPABILITY"]:
            cap_fbgemm()
        print(json.dumps(measured_here(given.child)))
        return
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), SHAPES[SHAPE])
        for _ in range(given.rounds):
            for way, environment in WAYS.items():
                taken[way].append(in_a_child(Path(folder), environment))
                print(json.dumps({"way": way, **taken[way][-1]}), file=sys.stderr, flush=True)
    print(json.dumps({"shape": SHAPE, "ways": {way: least(rounds) for way, rounds in taken.items()}, **machine()}))


if __name__ == "__main__":
    main()
