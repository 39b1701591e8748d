"""Activations between two stages: raw little-endian rows on the wire, tensors here.

Before rows of a peer join a step, and before rows are sent, they are looked through once: what is NaN or infinite is of no
use to any stage, and its sequence is refused alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from node.engine.api import HiddenOut, SequenceKey, SequenceLost
from node.engine.faults import finite_rows
from node.engine.scheduling.sequence import PushedActivations
from node.engine.scheduling.step_plan import ScheduledChunk, StepPlan


def activations(chunk: ScheduledChunk, part: PushedActivations) -> torch.Tensor:
    """What of a push belongs to the chunk, `[rows, hidden]`; its element size tells float32 from bfloat16."""
    hidden_size = chunk.sequence.hidden_size
    dtype = torch.float32 if len(part.data) == 4 * part.count * hidden_size else torch.bfloat16
    rows = torch.frombuffer(bytearray(part.data), dtype=dtype).view(part.count, hidden_size)
    first = max(chunk.position - part.position, 0)
    return rows[first : min(chunk.position + chunk.count - part.position, part.count)]


def received(plan: StepPlan, dtype: torch.dtype) -> torch.Tensor:
    """The rows `[rows, hidden]` of a step behind the first layers, in the order of its chunks."""
    return torch.cat([activations(chunk, part).to(dtype) for chunk in plan.chunks for part in chunk.pushed])


def hidden_outputs(plan: StepPlan, hidden: torch.Tensor) -> list[HiddenOut]:
    """A step's activations `[rows, hidden]`, cut into those of each sequence."""
    outputs = []
    row = 0
    for chunk in plan.chunks:
        rows = hidden[row : row + chunk.count].contiguous()
        raw = rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows
        data = raw.numpy().tobytes()
        outputs.append(HiddenOut(chunk.sequence.key, chunk.position, chunk.count, data, chunk.names, chunk.draft, chunk.rewinds))
        row += chunk.count
    return outputs


def spoiled(plan: StepPlan, rows: torch.Tensor) -> frozenset[SequenceKey]:
    """The sequences of which some of the step's `rows` `[rows, hidden]` are no finite numbers."""
    finite = finite_rows(rows)
    if bool(finite.all()):
        return frozenset()
    parts = finite[: sum(chunk.count for chunk in plan.chunks)].split([chunk.count for chunk in plan.chunks])
    return frozenset(chunk.sequence.key for chunk, part in zip(plan.chunks, parts) if not bool(part.all()))


def not_finite(plan: StepPlan, keys: frozenset[SequenceKey], *, by_previous: bool) -> list[SequenceLost]:
    """What is said of sequences of a step whose numbers are not finite: as the stage before sent them, or as they came out here.

    Another path may do without that peer; what the model itself lets overflow would overflow there too.
    """
    assert plan.lane is not None
    layers = f"layers {plan.lane.start}:{plan.lane.end} of {plan.lane.span.model}"
    reason = f"{layers} computed numbers that are not finite: a failure of the model's numbers, of no peer"
    if by_previous:
        reason = f"the stage before {layers} sent activations that are not finite numbers"
    return [SequenceLost(key, reason, retryable=by_previous, by_previous=by_previous) for key in sorted(keys)]


def without(plan: StepPlan, rows: torch.Tensor, keys: frozenset[SequenceKey]) -> tuple[StepPlan, torch.Tensor]:
    """The step without these sequences, and what is left of its `rows` `[rows, hidden]`."""
    parts = rows.split([chunk.count for chunk in plan.chunks])
    left = [(chunk, part) for chunk, part in zip(plan.chunks, parts) if chunk.sequence.key not in keys]
    chunks = tuple(chunk for chunk, _ in left)
    return replace(plan, chunks=chunks), torch.cat([part for _, part in left]) if left else rows[:0]
