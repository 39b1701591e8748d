"""The training loop: batch by batch, to a number of steps or to the end of a time budget, resumable at any checkpoint."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tools.default_model import checkpoints
from tools.default_model.checkpoints import Run
from tools.default_model.curriculum import LAST_BY_MASTERY, LESSON_STEPS, MASTERED, NOTICE_STEPS, STAGES, stage_at
from tools.default_model.examples import Batch
from tools.default_model.feeding import batches
from tools.default_model.model import Model, block_mask
from tools.default_model.optimisers import Optimisers

PLACES_MULTIPLE = 256
REPORTED = 5  # sums that `_loss` returns


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

    def stage_of(step: int) -> int:
        return stage_at(progress(step), step, run.ends)

    feed = batches(plan.work, run.seed, run.steps, run.step_tokens, stage_of, plan.workers)
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
        end_stage_if_mastered(run, stage, *_of_skill(stage, sums))
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


def _of_skill(stage: int, sums: Tensor) -> tuple[float, float]:
    choices_right, choices, copies_right, copies, _ = sums.tolist()
    return (choices_right, choices) if STAGES[stage].skill == "choosing" else (copies_right, copies)


def end_stage_if_mastered(run: Run, stage: int, right: float, asked: float) -> None:
    """Notes the end of a stage some steps ahead, so that it is the same however far ahead batches are made.

    `right` of `asked` tokens of the stage's skill were right in the step that ended now, a step of `stage`.
    """
    if stage != len(run.ends) or stage > LAST_BY_MASTERY:
        return  # the end of this stage is noted already, or it ends by the run's share alone
    right, asked = run.lesson[0] + right, run.lesson[1] + asked
    if run.steps % LESSON_STEPS == 0:
        if right >= MASTERED * asked > 0:
            run.ends.append(run.steps + NOTICE_STEPS)
        right = asked = 0.0
    run.lesson = [right, asked]


def compute_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast: 12 times float32 with AMX; without AMX it is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else torch.float32


def _loss(
    model: Model, forward: Callable[..., Tensor], batch: Batch, device: torch.device, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weighted mean loss, and what the report counts: choosing tokens right and all, copying tokens right and all, the loss.

    Logits are made only where something is to be learned: they would be the largest product of all.
    """
    ids = torch.from_numpy(batch.ids).to(device, torch.long, non_blocking=True)
    positions = torch.from_numpy(batch.positions).to(device, torch.long, non_blocking=True)
    mask = block_mask(torch.from_numpy(batch.segments).to(device, non_blocking=True), compute)
    learned = _learned_places(batch.weights.reshape(-1))
    places = torch.from_numpy(learned).to(device, non_blocking=True)
    weights = torch.from_numpy(batch.weights.reshape(-1)[learned]).to(device, non_blocking=True)
    hidden = forward(ids, positions, mask, compute)
    logits = model.logits(hidden.flatten(0, 1)[places]).float()
    targets = ids.reshape(-1)[places + 1]
    losses = functional.cross_entropy(logits, targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    with torch.no_grad():
        right = logits.argmax(-1) == targets
        choice, copy = weights > 1.0, weights == 1.0
        counts = [(right & choice).sum(), choice.sum(), (right & copy).sum(), copy.sum(), loss.detach()]
    return loss, torch.stack([each.float() for each in counts])


def _learned_places(weights: np.ndarray) -> np.ndarray:
    """Where something is to be learned, filled up with other places to a multiple of `PLACES_MULTIPLE`.

    Kernels are made for a shape and kept: a new number of places every step makes them without end, and the run ever slower.
    """
    places = weights.nonzero()[0]
    spare = -len(places) % PLACES_MULTIPLE
    return np.concatenate([places, (weights[:-1] == 0).nonzero()[0][:spare]])


def _report(plan: Plan, run: Run, stage: int, tally: _Tally, norm: float) -> None:
    """One line to the log and to standard error: how often the choosing and how often the copying tokens are right."""
    choices_right, choices, copies_right, copies, loss = tally.sums.tolist()
    line = {
        "step": run.steps,
        "stage": stage,
        "seconds": round(run.seconds, 1),
        "tokens": run.tokens,
        "tokens_per_s": round(tally.tokens / max(1e-9, time.monotonic() - tally.began_s)),
        "loss": round(loss / tally.steps, 4),
        "choice_right": round(choices_right / max(1.0, choices), 4),
        "copy_right": round(copies_right / max(1.0, copies), 4),
        "norm": round(norm, 3),
    }
    with (plan.work / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    print(json.dumps(line), file=sys.stderr, flush=True)
