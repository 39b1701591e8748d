"""A step's rows as its stage takes them: the chunks of the plan one behind the other, with their keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from node.engine.api import SequenceKey
from node.engine.kv.cache import SequenceKV
from node.engine.kv.page_store import PageStore
from node.engine.model.attention import Segment
from node.engine.scheduling.step_plan import StepPlan


@dataclass(slots=True)
class StepInputs:
    segments: list[Segment] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logits_at: list[int] = field(default_factory=list)


def rows_of(plan: StepPlan, stage: Any, stored: dict[SequenceKey, SequenceKV], kept: PageStore) -> StepInputs:
    """The rows of a step on `stage`; keys and values of new sequences are added to `stored`, and pages restored.

    Raises:
        PageLost: a page that a sequence begins with cannot be had any more.
    """
    rows = StepInputs()
    for chunk in plan.chunks:
        kv = stored.get(chunk.sequence.key) or stored.setdefault(chunk.sequence.key, stage.sequence())
        if chunk.restore:
            kv.restore(kept.get(chunk.restore))
        rows.segments.append(Segment(len(rows.positions), chunk.count, chunk.position, kv))
        rows.positions += range(chunk.position, chunk.position + chunk.count)
        rows.ids += chunk.tokens
        if chunk.draws:
            rows.logits_at += range(len(rows.positions) - 1 - len(chunk.draft), len(rows.positions))
    return rows


def compute(
    plan: StepPlan, stage: Any, stored: dict[SequenceKey, SequenceKV], kept: PageStore, hidden: torch.Tensor | None
) -> torch.Tensor:
    """One forward: activations `[rows, hidden]`, or logits `[chunks that draw, vocab]` behind the last layer.

    `hidden`: the rows that came from the stage before; None: this is the first. Raises PageLost, as `rows_of`.
    """
    assert plan.lane is not None
    rows = rows_of(plan, stage, stored, kept)
    out: torch.Tensor = stage.forward(
        plan.lane.start,
        plan.lane.end,
        rows.segments,
        rows.positions,
        ids=rows.ids if hidden is None else None,
        hidden=hidden,
        logits_at=rows.logits_at,
    )
    return out
