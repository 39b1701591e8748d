"""One command from nothing to a model directory: `python -m tools.default_model.train`.

Prepares text and tokenizer in the work folder unless they are there, trains (or goes on from the work folder's
checkpoint), and exports. Killed at any moment, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random

import torch

from tools.default_model import checkpoints, export
from tools.default_model.checkpoints import Run
from tools.default_model.examples import Maker
from tools.default_model.model import Model
from tools.default_model.optimisers import Optimisers
from tools.default_model.prose import Prose, collect
from tools.default_model.shape import SHAPES
from tools.default_model.training import Plan, train
from tools.default_model.vocabulary import train_tokenizer

PROJECT = Path(__file__).resolve().parents[2]
STEP_TOKENS = {"cpu": 4096, "cuda": 65_536}
DEFAULT_SECONDS = 7200.0
TOKENIZER_EXAMPLES = 6000


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.steps is None and given.seconds is None:
        given.seconds = DEFAULT_SECONDS
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    device = given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[given.shape if given.shape != "auto" else "gpu" if device == "cuda" else "cpu"]
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high")
    prepare(work, given.seed, shape.vocabulary)
    if given.prepare_only:
        return 0
    run = checkpoints.read_run(work) or Run(shape, given.seed, given.step_tokens or STEP_TOKENS[device])
    if run.shape != shape or run.seed != given.seed:
        print(f"{work} holds a run of another shape or seed ({run.shape}, {run.seed}); give another --work", file=sys.stderr)
        return 2
    run.device = _device_name(device)
    model = Model(shape, given.seed)
    optimisers = Optimisers(model)
    if run.steps:
        checkpoints.restore(work, model, optimisers)
    if given.export_only:
        if not run.steps:
            print(f"{work} holds no checkpoint to export", file=sys.stderr)
            return 2
    elif not _is_over(run, given):
        workers = given.workers if given.workers is not None else 12 if device == "cuda" else 1
        compiled = given.compile if given.compile is not None else device == "cuda" or (given.seconds or 0) >= 900
        plan = Plan(
            work,
            device,
            given.steps,
            given.seconds,
            workers,
            compiled,
            checkpoint_every_s=given.checkpoint_every,
            session_s=given.session,
        )
        run = train(plan, run, model, optimisers)
    export.export(given.out or work / export.NAME, run, model, work)
    return 0


def prepare(work: Path, seed: int, vocabulary: int) -> None:
    """The prose and the tokenizer of a run, made once; the tokenizer also sees what the generator makes (*blocking*, minutes)."""
    if not (work / "prose.json").is_file():
        collect(PROJECT).save(work / "prose.json")
    if (work / "tokenizer.json").is_file():
        return
    prose = Prose.load(work / "prose.json")
    chance = Random(seed)
    drawn = islice(Maker(prose, None, seed).texts(chance), TOKENIZER_EXAMPLES)
    train_tokenizer([*prose.paragraphs, *drawn], vocabulary).save(str(work / "tokenizer.json"))


def _is_over(run: Run, given: argparse.Namespace) -> bool:
    return bool(run.steps >= given.steps if given.steps is not None else run.seconds >= given.seconds)


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {_cpu_name()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.default_model.train", description=__doc__.split("\n")[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="time budget of the training, earlier parts of the run counted in")
    length.add_argument("--steps", type=int, help="number of steps instead: the same weights however often interrupted")
    parser.add_argument("--session", type=float, metavar="SECONDS", help="leave after so long, to go on with the same command")
    parser.add_argument("--work", type=Path, default=Path("build/default-model"), help="text, tokenizer, checkpoint, log")
    parser.add_argument("--out", type=Path, help="model directory to write (default: mesh-demo in the work folder)")
    parser.add_argument("--seed", type=int, default=20_261_121)
    parser.add_argument("--shape", choices=["auto", *SHAPES], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--workers", type=int, help="processes that make data (default: 1; 12 with a GPU; 0: none)")
    parser.add_argument("--step-tokens", type=int, help="tokens a step, in rows of the stage's length")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: GPU or 15 minutes on)")
    parser.add_argument("--checkpoint-every", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--prepare-only", action="store_true", help="make text and tokenizer, train nothing")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint as it is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
