"""Causal attention over block tables, by torch's own means: one form for every device, one for the flash kernel of CUDA.

`TILED` takes the pages of a table one column after the other, with running largest scores and sums (the way of flash
attention, arXiv 2205.14135), all in float32. A tile of eight rows meets 256 keys in products of one fixed shape, and a page that
lies wholly behind a row's position changes no bit of it: its weights are exactly zero. So a row's bits depend on its
own position alone, if the products' do not depend on how many tiles stand beside it, which the self-check of a load tries.

`FLASH` is `torch.nn.attention.varlen.varlen_attn` with a block table and `num_splits=1`, for which torch promises the same
bits whatever else is in the batch. It knows neither sinks nor capped scores, and takes half precision only. Not run on
a GPU yet; on this side its arguments are tested against what torch documents of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from node.engine.paged.kv import PagedStore
from node.engine.paged.plan import KV_PAGE_TOKENS, PADDING_SLOT, TILE_ROWS, PagedPlan, StepSizes, shapes

HIDDEN = -1e30  # finite, so that a page of nothing but masked keys gives no NaN: what it adds is multiplied by zero later


@dataclass(slots=True)
class StepTensors:
    """`plan.Numbers` on the device, int64, as views of one flat tensor."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    tile_rows: torch.Tensor
    tile_positions: torch.Tensor
    tile_parts: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    wanted: torch.Tensor


def views(sizes: StepSizes, flat: torch.Tensor) -> StepTensors:
    wanted = shapes(sizes)
    counts = [torch.Size(shape).numel() for shape in wanted.values()]
    parts = flat[: sum(counts)].split(counts)
    return StepTensors(*(part.view(shape) for part, shape in zip(parts, wanted.values())))


Attend = Callable[
    ["PagedStep", torch.Tensor, torch.Tensor, torch.Tensor, float, int, float | None, torch.Tensor | None], torch.Tensor
]
"""(step, q `[rows, heads, dim]`, keys and values `[pages, 256, kv_heads, dim]`, scale, window, softcap, sinks) -> as q."""


@dataclass(slots=True)
class PagedStep:
    """What the layers of one step share."""

    store: PagedStore
    tensors: StepTensors
    longest_part: int
    attend_by: Attend
    windows: set[int] = field(default_factory=set)  # that attention was asked to look through

    @classmethod
    def of(cls, store: PagedStore, plan: PagedPlan, flat: torch.Tensor, attend_by: Attend) -> PagedStep:
        return cls(store, views(plan.sizes, flat), plan.longest_part, attend_by)

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
        """As `attention.attend`; rows outside every sequence come out as anything."""
        self.windows.add(window)
        sides = kv.view(kv.shape[0], 2, -1, kv.shape[2]).unbind(1)
        pools = self.store.pool(layer, sides[0])
        for pool, side in zip(pools, sides):
            flat = pool.flatten(0, 1)
            flat.index_copy_(0, self.tensors.slots, side)
            flat[PADDING_SLOT].zero_()  # shorter tables end with this page, and what is masked is multiplied by zero: no NaN
        return self.attend_by(self, q, *pools, scale, window, softcap, sinks)


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
    given = step.tensors
    tiles, kv_heads, dim = len(given.tile_parts), keys.shape[2], q.shape[2]
    group = q.shape[1] // kv_heads
    queries = q[given.tile_rows.flatten()].view(tiles, TILE_ROWS, kv_heads, group, dim).permute(0, 2, 1, 3, 4)
    queries = queries.reshape(tiles, kv_heads, TILE_ROWS * group, dim).float() * scale
    rows = given.tile_positions.repeat_interleave(group, 1)[:, None, :, None]  # [tiles, 1, 8 * group, 1]
    largest = torch.full_like(queries[..., :1], HIDDEN)
    total = torch.zeros_like(largest)
    answer = torch.zeros_like(queries)
    tables = given.tables[given.tile_parts]  # [tiles, columns]
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
        scores = scores.masked_fill(hidden, HIDDEN)
        above = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, fade = torch.exp(scores - above), torch.exp(largest - above)
        total = total * fade + weights.sum(-1, keepdim=True)
        answer = answer * fade + weights @ near_values
        largest = above
    if sinks is not None:
        sink = sinks.float().view(1, kv_heads, 1, group).expand(tiles, -1, TILE_ROWS, -1).reshape(tiles, kv_heads, -1, 1)
        above = torch.maximum(largest, sink)
        fade = torch.exp(largest - above)
        total, answer = total * fade + torch.exp(sink - above), answer * fade
    answer = (answer / total).view(tiles, kv_heads, TILE_ROWS, group, dim).permute(0, 2, 1, 3, 4)
    return answer.reshape(tiles * TILE_ROWS, -1, dim)[given.places].to(q.dtype)


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
    """Raises ValueError: capped scores or sinks."""
    if softcap or sinks is not None:
        raise ValueError("torch's flash attention knows neither capped scores nor sinks")
    from torch.nn.attention.varlen import varlen_attn  # imported where there is a GPU to use it

    given = step.tensors
    out = varlen_attn(
        q.contiguous(),
        keys,
        values,
        given.starts.int(),
        None,
        step.longest_part,
        given.tables.shape[1] * KV_PAGE_TOKENS,  # of the tables, not of this step's sequences: a recorded step meets longer ones
        scale=scale,
        window_size=(window - 1 if window else -1, 0),  # a row sees itself and `window - 1` before it
        enable_gqa=q.shape[1] > keys.shape[2],
        seqused_k=given.lengths.int(),
        block_table=given.tables.int(),
        num_splits=1,
    )
    assert isinstance(out, torch.Tensor)
    return out


ATTENTION: dict[str, Attend] = {"tiled": tiled, "flash": flash}
