"""The training loop: batch by batch, to a number of steps or to the end of a time budget, resumable at any checkpoint."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tools.default_model import checkpoints
from tools.default_model.checkpoints import Run
from tools.default_model.curriculum import stage_at
from tools.default_model.examples import Batch
from tools.default_model.feeding import batches
from tools.default_model.model import Model, block_mask
from tools.default_model.optimisers import Optimisers

POINTING_WEIGHT = 0.5  # of the pointer's loss beside the tokens'
REPORTED = 7  # sums that `_loss` returns


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train. Of `steps` and `seconds` one is set; `seconds` counts earlier parts of a resumed run in."""

    work: Path
    device: str
    steps: int | None
    seconds: float | None
    workers: int
    compiled: bool
    checkpoint_every_s: float = 120.0
    report_every_s: float = 10.0
    stop_after_steps: int | None = None  # leave here, with a checkpoint, to be gone on from
    session_s: float | None = None  # likewise after so long in this call


@dataclass(slots=True)
class _Tally:
    """Sums since the last report, kept on the device: reading them out makes it wait."""

    sums: Tensor
    began_s: float = field(default_factory=time.monotonic)
    tokens: int = 0
    steps: int = 0


def train(plan: Plan, run: Run, model: Model, optimisers: Optimisers, clock: Callable[[], float] = time.monotonic) -> Run:
    """Trains on from where `run` is to the end of the plan, and leaves a checkpoint.

    Raises:
        FloatingPointError: the gradient is not finite: nothing after that would be worth keeping.
    """
    device = torch.device(plan.device)
    compute = compute_type(device)
    model.to(device)
    forward = torch.compile(model, dynamic=False) if plan.compiled else model
    before_s, began_s = run.seconds, clock()
    saved_s = began_s

    def progress(step: int) -> float:
        if plan.steps is not None:
            return step / plan.steps
        assert plan.seconds is not None
        return run.seconds / plan.seconds

    tally = _Tally(torch.zeros(REPORTED, device=device))
    feed = batches(plan.work, run.seed, run.steps, run.step_tokens, lambda number: stage_at(progress(number)), plan.workers)
    for stage, batch in feed:
        loss, sums = _loss(model, forward, batch, device, compute)
        loss.backward()
        norm = optimisers.step(progress(run.steps))
        if not norm < float("inf"):
            raise FloatingPointError(f"gradient norm {norm} at step {run.steps}")
        run.steps += 1
        run.tokens += batch.ids.size
        run.answer_tokens += int((batch.weights >= 1.0).sum())
        run.seconds = before_s + clock() - began_s
        tally.sums += sums
        tally.tokens += batch.ids.size
        tally.steps += 1
        over = progress(run.steps) >= 1.0 or run.steps == plan.stop_after_steps
        over = over or (plan.session_s is not None and run.seconds - before_s >= plan.session_s)
        if over or clock() - tally.began_s > plan.report_every_s:
            _report(plan, run, stage, tally, norm)
            tally = _Tally(torch.zeros(REPORTED, device=device), clock())
        if over or clock() - saved_s > plan.checkpoint_every_s:
            checkpoints.save(plan.work, run, model, optimisers)
            saved_s = clock()
        if over:
            break
    return run


def compute_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast: 12 times float32 with AMX; without AMX it is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else torch.float32


def _loss(
    model: Model, forward: Callable[..., Tensor], batch: Batch, device: torch.device, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weighted mean loss with the pointer's, and what the report counts: choosing tokens right and all, copying tokens
    right and all, the loss without the pointer's, questions pointed right and all.

    Logits are made only where something is to be learned: they would be the largest product of all.
    """
    ids = torch.from_numpy(batch.ids).to(device, torch.long, non_blocking=True)
    positions = torch.from_numpy(batch.positions).to(device, torch.long, non_blocking=True)
    mask = block_mask(torch.from_numpy(batch.segments).to(device, non_blocking=True), compute)
    places = torch.from_numpy(batch.weights.reshape(-1).nonzero()[0]).to(device, non_blocking=True)
    weights = torch.from_numpy(batch.weights[batch.weights > 0]).to(device, non_blocking=True)
    hidden, below = forward(ids, positions, mask, compute)
    logits = model.logits(hidden.flatten(0, 1)[places]).float()
    targets = ids.reshape(-1)[places + 1]
    losses = functional.cross_entropy(logits, targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    pointed = torch.from_numpy(batch.pointed).to(device, non_blocking=True)
    scores = model.pointer(below.flatten(0, 1), torch.from_numpy(batch.marks).to(device, non_blocking=True))
    pointing = functional.cross_entropy(scores, pointed, reduction="sum") / max(1, len(pointed))
    with torch.no_grad():
        right = logits.argmax(-1) == targets
        choice, copy = weights > 1.0, weights == 1.0
        counts = [(right & choice).sum(), choice.sum(), (right & copy).sum(), copy.sum(), loss]
        if len(pointed):
            counts += [(scores.argmax(-1) == pointed).sum(), torch.tensor(len(pointed), device=device)]
        else:
            counts += [torch.zeros((), device=device)] * 2
    return loss + POINTING_WEIGHT * pointing, torch.stack([each.float() for each in counts])


def _report(plan: Plan, run: Run, stage: int, tally: _Tally, norm: float) -> None:
    """One line to the log and to standard error: how often the choosing and how often the copying tokens are right."""
    choices_right, choices, copies_right, copies, loss, points_right, points = tally.sums.tolist()
    line = {
        "step": run.steps,
        "stage": stage,
        "seconds": round(run.seconds, 1),
        "tokens": run.tokens,
        "tokens_per_s": round(tally.tokens / max(1e-9, time.monotonic() - tally.began_s)),
        "loss": round(loss / tally.steps, 4),
        "choice_right": round(choices_right / max(1.0, choices), 4),
        "copy_right": round(copies_right / max(1.0, copies), 4),
        "point_right": round(points_right / max(1.0, points), 4),
        "norm": round(norm, 3),
    }
    with (plan.work / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    print(json.dumps(line), file=sys.stderr, flush=True)
