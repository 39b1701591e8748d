"""The tensors of a step: a plan's chunks as the rows of one forward pass, and its output divided among their sequences.

Activations travel as raw little-endian rows. Rows from a peer are checked before they join a step, and rows for a peer before
they are sent: a row with NaN or infinity is of no use to any stage, so its sequence is refused, and only that one.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from node.engine.api import HiddenOut, SequenceKey, SequenceLost
from node.engine.faults import finite_rows
from node.engine.kv.cache import SequenceKV
from node.engine.kv.page_store import PageStore
from node.engine.model.attention import Segment
from node.engine.model.stage import Stage
from node.engine.scheduling.sequence import PushedActivations, ScheduledChunk, StepPlan


def received_activations(plan: StepPlan, dtype: torch.dtype) -> torch.Tensor:
    """Returns the rows `[rows, hidden]` that earlier stages pushed for a step, in the order of its chunks."""
    return torch.cat([_pushed_rows(chunk, part).to(dtype) for chunk in plan.chunks for part in chunk.pushed])


def _pushed_rows(chunk: ScheduledChunk, part: PushedActivations) -> torch.Tensor:
    """Returns those rows `[rows, hidden]` of a push that belong to the chunk."""
    hidden_size = chunk.sequence.hidden_size
    dtype = torch.float32 if len(part.data) == 4 * part.count * hidden_size else torch.bfloat16
    rows = torch.frombuffer(bytearray(part.data), dtype=dtype).view(part.count, hidden_size)
    first = max(chunk.position - part.position, 0)
    return rows[first : min(chunk.position + chunk.count - part.position, part.count)]


def forward(
    plan: StepPlan,
    stage: Stage,
    caches: dict[SequenceKey, SequenceKV],
    pages: PageStore,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """Computes a step: activations `[rows, hidden]`, or logits `[drawn rows, vocab]`, float32, behind the last layer.

    `hidden`: the rows from the stage before; None on the first stage. `caches` gets an entry for each new sequence. The drawn
    rows are the last row of each chunk that draws, and those before its guesses.

    Raises:
        PageLost: a page that a sequence restores cannot be read.
    """
    assert plan.lane is not None
    segments: list[Segment] = []
    positions: list[int] = []
    ids: list[int] = []
    logits_at: list[int] = []
    for chunk in plan.chunks:
        kv = caches.get(chunk.sequence.key) or caches.setdefault(chunk.sequence.key, stage.sequence())
        if chunk.restore_pages:
            kv.restore(pages.get(chunk.restore_pages))
        segments.append(Segment(len(positions), chunk.count, chunk.position, kv))
        positions += range(chunk.position, chunk.position + chunk.count)
        ids += chunk.tokens
        if chunk.draws:
            logits_at += range(len(positions) - 1 - len(chunk.draft), len(positions))
    assert len(ids) == len(positions) if hidden is None else len(hidden) == len(positions)
    return stage.forward(
        plan.lane.start,
        plan.lane.end,
        segments,
        positions,
        ids=ids if hidden is None else None,
        hidden=hidden,
        logits_at=logits_at,
    )


def hidden_outputs(plan: StepPlan, hidden: torch.Tensor) -> list[HiddenOut]:
    """Divides a step's activations `[rows, hidden]` among its sequences, as bytes for the next stage."""
    outputs = []
    first = 0
    for chunk in plan.chunks:
        rows = hidden[first : first + chunk.count].contiguous()
        raw = rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows  # numpy has no bfloat16
        data = raw.numpy().tobytes()
        outputs.append(
            HiddenOut(
                chunk.sequence.key,
                chunk.position,
                chunk.count,
                data,
                names=chunk.page_names,
                draft=chunk.draft,
                rewinds=chunk.rewinds,
            )
        )
        first += chunk.count
    return outputs


def non_finite_sequences(plan: StepPlan, rows: torch.Tensor) -> frozenset[SequenceKey]:
    """Returns the sequences of which some of the step's `rows` `[rows, hidden]` hold NaN or infinity."""
    finite = finite_rows(rows)
    if bool(finite.all()):
        return frozenset()
    parts = finite[: sum(chunk.count for chunk in plan.chunks)].split([chunk.count for chunk in plan.chunks])
    return frozenset(chunk.sequence.key for chunk, part in zip(plan.chunks, parts) if not bool(part.all()))


def non_finite_losses(plan: StepPlan, keys: frozenset[SequenceKey], *, by_previous: bool) -> list[SequenceLost]:
    """Returns the losses of sequences with numbers that are not finite: received so (`by_previous`), or computed so here.

    A path without the previous stage may compute the sequence; where finite activations overflow here, the model itself is the
    cause, and they overflow on any path.
    """
    assert plan.lane is not None
    layers = f"layers {plan.lane.start}:{plan.lane.end} of {plan.lane.span.model}"
    reason = f"{layers} computed numbers that are not finite: a failure of the model's numbers, of no peer"
    if by_previous:
        reason = f"the stage before {layers} sent activations that are not finite numbers"
    return [SequenceLost(key, reason, retryable=by_previous, by_previous=by_previous) for key in sorted(keys)]


def without_sequences(plan: StepPlan, rows: torch.Tensor, keys: frozenset[SequenceKey]) -> tuple[StepPlan, torch.Tensor]:
    """Returns the step without some sequences, and its remaining `rows` `[rows, hidden]`."""
    parts = rows.split([chunk.count for chunk in plan.chunks])
    remaining = [(chunk, part) for chunk, part in zip(plan.chunks, parts, strict=True) if chunk.sequence.key not in keys]
    chunks = tuple(chunk for chunk, _ in remaining)
    return replace(plan, chunks=chunks), torch.cat([part for _, part in remaining]) if remaining else rows[:0]
