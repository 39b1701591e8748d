"""Causal attention over ragged packed rows, the same bits however a sequence was batched or chunked.

Registered with transformers as the attention of every model that uses `AttentionInterface`. A matrix kernel's rounding
depends on the shapes it is given (research/engine.md §8), so the shapes depend on a row's position alone:

1. the keys that a query meets are those up to the end of its own *stretch* of 128 positions, masked behind the query
   itself. A prefill is cut at the stretches' ends, which also spares it half of the masked work. (Padding all queries of
   a chunk to one multiple of 512, as first measured, is exact too, but costs short contexts four times the attention.)
2. query rows are padded to a multiple of 8: a lone row takes another kernel than a row among others.
3. one-token queries that share a KV head are stacked along the rows of that head, so each KV head is read once. That
   changes no bit, for a row's result does not depend on its place among the rows.

Capped scores and attention sinks have no fused kernel: they go through plain matrix products of one fixed shape.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from node.engine.kvcache import STRETCH, SequenceKV

NAME = "mesh"
ROW_QUANTUM = 8


@dataclass(slots=True)
class Segment:
    """The rows `[row, row + count)` of a packed batch: one sequence's positions `position … position + count - 1`."""

    row: int
    count: int
    position: int
    kv: SequenceKV


@dataclass(slots=True)
class Tile:
    """Rows of one sequence within one stretch, and the keys they meet: positions `first … first + length - 1`."""

    row: int
    count: int
    kv: SequenceKV
    first: int
    length: int
    mask: torch.Tensor  # [1, 1, 1 or padded rows, length]: 0 where a row may look, else minus infinity


@dataclass(slots=True)
class PackedBatch:
    """What the layers of one forward share. `layer` is set by the layer slots as the forward goes along."""

    segments: list[Segment]
    start: int
    end: int
    hidden: torch.Tensor | None = None  # [1, rows, hidden]: what stands before layer `start`
    captured: torch.Tensor | None = None  # [1, rows, hidden]: what came out of layer `end - 1`
    layer: int = -1
    tiles: dict[int, tuple[list[Tile], list[Tile]]] = field(default_factory=dict)

    def tiles_for(self, window: int, dtype: torch.dtype) -> tuple[list[Tile], list[Tile]]:
        """One-row tiles and longer ones; made once for all layers with the same window (0: none)."""
        made = self.tiles.get(window)
        if made is None:
            tiles = [tile for segment in self.segments for tile in _cut(segment, window, dtype)]
            made = [tile for tile in tiles if tile.count == 1], [tile for tile in tiles if tile.count > 1]
            self.tiles[window] = made
        return made


_thread = threading.local()  # load's self-check runs beside the engine thread


def set_batch(batch: PackedBatch | None) -> None:
    """The batch that the attention of this thread's forward works on."""
    _thread.batch = batch


def padded(tokens: int, quantum: int) -> int:
    return -(-tokens // quantum) * quantum


def _cut(segment: Segment, window: int, dtype: torch.dtype) -> Iterator[Tile]:
    position, end = segment.position, segment.position + segment.count
    while position < end:
        stretch = position // STRETCH * STRETCH
        upto = min(end, stretch + STRETCH)
        first = max(0, stretch - window + 1) // STRETCH * STRETCH if window else 0
        length = stretch + STRETCH - first
        mask = _mask(position - first, upto - position, length, window, dtype)
        yield Tile(segment.row + position - segment.position, upto - position, segment.kv, first, length, mask)
        position = upto


def _mask(position: int, count: int, length: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows past `count` (padding) copy the last one; a single row serves all of its copies."""
    tall = padded(count, ROW_QUANTUM) if count > 1 else 1
    rows = torch.arange(position, position + tall).clamp_(max=position + count - 1)[:, None]
    columns = torch.arange(length)[None]
    hidden = columns > rows
    if window:
        hidden |= columns <= rows - window
    return torch.zeros(1, 1, tall, length, dtype=dtype).masked_fill_(hidden, float("-inf"))


def mesh_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """`query` `[1, heads, rows, dim]`, `key` and `value` `[1, kv_heads, rows, dim]`, positions already applied.

    Returns `[1, rows, heads, value_dim]`. Rows outside every segment come out as zeros.
    """
    batch: PackedBatch = _thread.batch
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    value_dim = value.shape[-1]
    query, key, value = _equal_dims(query, key, value)
    kv = torch.cat((key, value))  # [2, kv_heads, rows, dim]
    for segment in batch.segments:
        segment.kv.write(batch.layer, segment.position, kv.narrow(2, segment.row, segment.count))
    singles, longer = batch.tiles_for(sliding_window or 0, query.dtype)
    heads, rows, dim = query.shape[1:]
    out = query.new_zeros(rows, heads, dim)
    if softcap or s_aux is not None:
        for tile in (*singles, *longer):
            _attend_plainly(batch.layer, tile, query[0], scale, softcap, s_aux, out)
    else:
        _attend_singles(batch.layer, singles, query[0], kv.shape[1], scale, out)
        for tile in longer:
            _attend_rows(batch.layer, tile, query, kv.shape[1], scale, out)
    return out[None, ..., :value_dim], None


def _equal_dims(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Zero columns make heads of unequal size equal, which the fused kernel wants; they add nothing."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [tensor if tensor.shape[-1] == widest else F.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in tensors]


def _attend_singles(layer: int, tiles: list[Tile], q: torch.Tensor, kv_heads: int, scale: float, out: torch.Tensor) -> None:
    """Decoding rows: `q` `[heads, rows, dim]`, the heads of each KV head stacked as rows."""
    if not tiles:
        return
    heads, _, dim = q.shape
    shared = heads // kv_heads
    first = tiles[0].row
    together = tiles[-1].row - first + 1 == len(tiles)  # as when all decode: views, no copies
    rows = slice(first, first + len(tiles)) if together else torch.tensor([tile.row for tile in tiles])
    stacked = q.new_zeros(len(tiles), kv_heads, padded(shared, ROW_QUANTUM), dim)
    stacked[:, :, :shared] = q[:, rows].transpose(0, 1).reshape(len(tiles), kv_heads, shared, dim)
    answers = []
    for tile, queries in zip(tiles, stacked.split(1)):
        keys, values = tile.kv.read(layer, tile.first, tile.length)
        answers.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=tile.mask, scale=scale))
    out[rows] = torch.cat(answers)[:, :, :shared].reshape(len(tiles), heads, dim)


def _attend_rows(layer: int, tile: Tile, q: torch.Tensor, kv_heads: int, scale: float, out: torch.Tensor) -> None:
    """Prefilling rows: `q` `[1, heads, rows, dim]`."""
    heads = q.shape[1]
    queries = F.pad(q[:, :, tile.row : tile.row + tile.count], (0, 0, 0, tile.mask.shape[2] - tile.count))
    keys, values = tile.kv.read(layer, tile.first, tile.length)
    answer = F.scaled_dot_product_attention(queries, keys, values, attn_mask=tile.mask, scale=scale, enable_gqa=heads > kv_heads)
    out[tile.row : tile.row + tile.count] = answer[0, :, : tile.count].transpose(0, 1)


def _attend_plainly(
    layer: int, tile: Tile, q: torch.Tensor, scale: float, softcap: float | None, sinks: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Capped scores or sinks: `q` `[heads, rows, dim]`; each product is `[heads, 8, dim]` by `[heads, dim, 128]` or back."""
    heads = q.shape[0]
    keys, values = (side[0].repeat_interleave(heads // side.shape[1], 0) for side in tile.kv.read(layer, tile.first, tile.length))
    keys = keys.transpose(-1, -2)
    stretches = [slice(at, at + STRETCH) for at in range(0, tile.length, STRETCH)]
    for row in range(0, tile.count, ROW_QUANTUM):
        count = min(ROW_QUANTUM, tile.count - row)
        at = slice(tile.row + row, tile.row + row + count)
        queries = F.pad(q[:, at], (0, 0, 0, ROW_QUANTUM - count))
        scores = torch.cat([queries @ keys[..., stretch] for stretch in stretches], -1) * scale  # [heads, 8, length]
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + (tile.mask[0] if tile.count == 1 else tile.mask[0, :, row : row + ROW_QUANTUM])
        if sinks is not None:
            scores = torch.cat([scores, sinks.reshape(-1, 1, 1).expand(heads, ROW_QUANTUM, 1).to(scores.dtype)], -1)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        answer = weights[..., stretches[0]] @ values[:, stretches[0]]
        for stretch in stretches[1:]:
            answer = answer + weights[..., stretch] @ values[:, stretch]
        out[at] = answer[:, :count].transpose(0, 1)


AttentionInterface.register(NAME, mesh_attention)
