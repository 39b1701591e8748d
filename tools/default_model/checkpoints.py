"""A training run on disk: weights, optimiser state and counts in one safetensors file, written aside and renamed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tools.default_model.model import Model
from tools.default_model.optimisers import Optimisers
from tools.default_model.shape import Shape

FILE = "checkpoint.safetensors"


@dataclass(slots=True)
class Run:
    """Where a run is. With a time budget progress follows `seconds`, else `steps`."""

    shape: Shape
    seed: int
    step_tokens: int
    steps: int = 0
    tokens: int = 0  # in rows, padding included
    answer_tokens: int = 0  # of those, the learned ones
    seconds: float = 0.0  # of training; making data beforehand and evaluation are not in it
    device: str = ""
    ends: list[int] = field(default_factory=list)  # the steps at which mastered stages ended
    lesson: list[float] = field(default_factory=lambda: [0.0, 0.0])  # choices right and all since it was last asked


def save(work: Path, run: Run, model: Model, optimisers: Optimisers) -> None:
    """Replaces the checkpoint in `work`; a kill at any moment leaves the old or the new one."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= optimisers.state()
    aside = work / f".{FILE}.{os.getpid()}"
    save_file({name: each.detach().contiguous().cpu() for name, each in tensors.items()}, aside, {"run": json.dumps(asdict(run))})
    with aside.open("rb+") as written:
        os.fsync(written.fileno())
    os.replace(aside, work / FILE)


def read_run(work: Path) -> Run | None:
    """Where the run in `work` is; None: there is none."""
    if not (work / FILE).is_file():
        return None
    with safe_open(work / FILE, "pt") as opened:
        content = json.loads(opened.metadata()["run"])
    return Run(**(content | {"shape": Shape(**content["shape"])}))


def restore(work: Path, model: Model, optimisers: Optimisers) -> None:
    """Puts the weights and the optimiser state of the run in `work` in place.

    Raises:
        RuntimeError: the checkpoint is of another shape.
    """
    weights: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    with safe_open(work / FILE, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
            owner, _, rest = name.partition(".")
            if owner == "model":
                weights[rest] = opened.get_tensor(name)
            else:
                state[name] = opened.get_tensor(name)
    model.load_state_dict(weights)
    optimisers.restore(state)
