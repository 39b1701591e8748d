"""The command line of a benchmark that measures one figure of the engine on the models of `bench.engine`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.engine_shapes import SHAPES, make_checkpoint
from bench.machine import machine


def run(name: str, measured: Callable[[Path, int, int], dict[str, Any]], *, rounds: int, quick_rounds: int) -> None:
    """Makes the model, measures, prints one JSON object. `measured`: of (checkpoint, threads, rounds)."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}")
    parser.add_argument("--quick", action="store_true", help="a model of 100 million parameters, fewer rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = "100M" if options.quick else "Llama-3.2-1B"
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), SHAPES[shape])
        figures = measured(Path(folder), options.threads, quick_rounds if options.quick else rounds)
    command = f"python -m bench.{name}{' --quick' if options.quick else ''} --threads {options.threads}"
    report = {"bench": name, "command": command, "shape": shape, **figures, "machine": machine()}
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
