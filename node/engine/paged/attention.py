"""Causal attention over block tables with torch's operations: one form for every device, one with CUDA's flash kernel.

`tiled` computes one page of each table after the other, with a running maximum and sum of the scores (online softmax, as in
flash attention, arXiv 2205.14135), all in float32. A tile of eight rows reads 256 keys in products of one fixed shape, and a
page after a row's position changes no bit of the row: its weights are exactly zero. So a row's bits depend on its own
position alone, if those of the products do not depend on the number of tiles, which the self-check of a load tries.

`flash` is `torch.nn.attention.varlen.varlen_attn` with a block table and `num_splits=1`, for which torch promises the same
bits whatever else is in the batch. It supports neither sinks nor soft-capped scores, and half precision only. It has not
been run on a GPU yet; its arguments are tested against torch's documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from node.engine.paged.kv import PagedStore
from node.engine.paged.plan import KV_PAGE_TOKENS, PADDING_SLOT, TILE_ROWS, PagedPlan, StepSizes, shapes

MASKED_SCORE = -1e30  # finite, so that a page of masked keys alone gives no NaN: its sum is later multiplied by zero


@dataclass(slots=True)
class StepTensors:
    """`plan.StepArrays` on the device, int64, as views of one flat tensor."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    answer_rows: torch.Tensor
    tile_rows: torch.Tensor
    tile_positions: torch.Tensor
    tile_segments: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    logit_rows: torch.Tensor


def views(sizes: StepSizes, flat: torch.Tensor) -> StepTensors:
    """Splits the flat tensor of a step into its arrays, without a copy."""
    logit_rows = shapes(sizes)
    counts = [torch.Size(shape).numel() for shape in logit_rows.values()]
    parts = flat[: sum(counts)].split(counts)
    return StepTensors(*(part.view(shape) for part, shape in zip(parts, logit_rows.values())))


Attend = Callable[
    ["PagedStep", torch.Tensor, torch.Tensor, torch.Tensor, float, int, float | None, torch.Tensor | None], torch.Tensor
]
"""(step, q `[rows, heads, dim]`, keys and values `[pages, 256, kv_heads, dim]`, scale, window, softcap, sinks) -> like q."""


@dataclass(slots=True)
class PagedStep:
    """State that the layers of one step share."""

    store: PagedStore
    tensors: StepTensors
    longest_segment: int
    attention: Attend
    windows: set[int] = field(default_factory=set)  # the sliding windows used; 0: all positions

    @classmethod
    def of(cls, store: PagedStore, plan: PagedPlan, flat: torch.Tensor, attention: Attend) -> PagedStep:
        return cls(store, views(plan.sizes, flat), plan.longest_segment, attention)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        kv: torch.Tensor,
        scale: float,
        window: int = 0,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `attend` of node.engine.model.attention; rows outside every sequence have undefined results."""
        self.windows.add(window)
        sides = kv.view(kv.shape[0], 2, -1, kv.shape[2]).unbind(1)
        pools = self.store.pool(layer, sides[0])
        for pool, side in zip(pools, sides):
            flat = pool.flatten(0, 1)
            flat.index_copy_(0, self.tensors.slots, side)
            flat[
                PADDING_SLOT
            ].zero_()  # shorter tables end with this page; masked values are multiplied by zero and must be no NaN
        return self.attention(self, q, *pools, scale, window, softcap, sinks)


def tiled(
    step: PagedStep,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Computes attention page by page with an online softmax, in float32."""
    tensors = step.tensors
    tiles, kv_heads, dim = len(tensors.tile_segments), keys.shape[2], q.shape[2]
    group = q.shape[1] // kv_heads
    queries = q[tensors.tile_rows.flatten()].view(tiles, TILE_ROWS, kv_heads, group, dim).permute(0, 2, 1, 3, 4)
    queries = queries.reshape(tiles, kv_heads, TILE_ROWS * group, dim).float() * scale
    rows = tensors.tile_positions.repeat_interleave(group, 1)[:, None, :, None]  # [tiles, 1, 8 * group, 1]
    running_max = torch.full_like(queries[..., :1], MASKED_SCORE)
    running_sum = torch.zeros_like(running_max)
    answer = torch.zeros_like(queries)
    tables = tensors.tables[tensors.tile_segments]  # [tiles, columns]
    for column in range(tables.shape[1]):
        page = tables[:, column]
        near_keys, near_values = (
            pool[page].permute(0, 2, 1, 3).float() for pool in (keys, values)
        )  # [tiles, kv_heads, 256, dim]
        scores = queries @ near_keys.transpose(-1, -2)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        where = torch.arange(column * KV_PAGE_TOKENS, (column + 1) * KV_PAGE_TOKENS, device=q.device)
        hidden = where > rows
        if window:
            hidden = hidden | (where <= rows - window)
        scores = scores.masked_fill(hidden, MASKED_SCORE)
        new_max = torch.maximum(running_max, scores.amax(-1, keepdim=True))
        weights, rescale = torch.exp(scores - new_max), torch.exp(running_max - new_max)
        running_sum = running_sum * rescale + weights.sum(-1, keepdim=True)
        answer = answer * rescale + weights @ near_values
        running_max = new_max
    if sinks is not None:
        sink = sinks.float().view(1, kv_heads, 1, group).expand(tiles, -1, TILE_ROWS, -1).reshape(tiles, kv_heads, -1, 1)
        new_max = torch.maximum(running_max, sink)
        rescale = torch.exp(running_max - new_max)
        running_sum, answer = running_sum * rescale + torch.exp(sink - new_max), answer * rescale
    answer = (answer / running_sum).view(tiles, kv_heads, TILE_ROWS, group, dim).permute(0, 2, 1, 3, 4)
    return answer.reshape(tiles * TILE_ROWS, -1, dim)[tensors.answer_rows].to(q.dtype)


def flash(
    step: PagedStep,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Computes attention with torch's flash kernel. Raises ValueError: soft-capped scores or sinks."""
    if softcap or sinks is not None:
        raise ValueError("torch's flash attention supports neither soft-capped scores nor sinks")
    from torch.nn.attention.varlen import varlen_attn  # only where there is a GPU: the import is slow

    tensors = step.tensors
    out = varlen_attn(
        q.contiguous(),
        keys,
        values,
        tensors.starts.int(),
        None,
        step.longest_segment,
        tensors.tables.shape[1]
        * KV_PAGE_TOKENS,  # of the tables, not of this step's sequences: a recorded step is replayed for longer ones
        scale=scale,
        window_size=(window - 1 if window else -1, 0),  # a row reads itself and the `window - 1` positions before it
        enable_gqa=q.shape[1] > keys.shape[2],
        seqused_k=tensors.lengths.int(),
        block_table=tensors.tables.int(),
        num_splits=1,
    )
    assert isinstance(out, torch.Tensor)
    return out


ATTENTION: dict[str, Attend] = {"tiled": tiled, "flash": flash}
