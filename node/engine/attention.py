"""Causal attention over ragged packed rows, the same bits however a sequence was batched or chunked.

Registered with transformers as the attention of every model that uses `AttentionInterface`. The rules, found by
measurement (research/engine.md §8):

1. query rows are padded to a multiple of 8: a lone row takes another matrix kernel than a row among others;
2. the KV length is padded with masked zeros to a multiple of 512, the block that the CPU kernel works in, so its last
   block always has the same shape;
3. where several query heads share one KV head, one-token queries are stacked along the rows of that head, so each KV head
   is read once. That changes no bit, for a row's result does not depend on its place among the rows.

Capped scores and attention sinks have no fused kernel: for those the same shapes go through plain matrix products.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from node.engine.blocks import BLOCK_TOKENS
from node.engine.kvcache import SequenceKV

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
class PackedBatch:
    """What the layers of one forward share. `layer` is set by the layer slots as the forward goes along."""

    segments: list[Segment]
    start: int
    end: int
    hidden: torch.Tensor | None = None  # [1, rows, hidden]: what stands before layer `start`
    captured: torch.Tensor | None = None  # [1, rows, hidden]: what came out of layer `end - 1`
    layer: int = -1
    masks: dict[tuple[int, int, int, int], torch.Tensor] = field(default_factory=dict)


_thread = threading.local()  # load's self-check runs beside the engine thread


def set_batch(batch: PackedBatch | None) -> None:
    """The batch that the attention of this thread's forward works on."""
    _thread.batch = batch


def padded(tokens: int, quantum: int) -> int:
    return -(-tokens // quantum) * quantum


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
    q, k, v = query[0], key[0], value[0]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = q.new_zeros(q.shape[1], q.shape[0], v.shape[-1])  # [rows, heads, value_dim]
    for segment in batch.segments:
        rows = slice(segment.row, segment.row + segment.count)
        segment.kv.write(batch.layer, segment.position, k[:, rows], v[:, rows])
        out[rows] = _attend(batch, segment, q[:, rows], scale, sliding_window or 0, softcap, s_aux)
    return out[None], None


def _attend(
    batch: PackedBatch,
    segment: Segment,
    q: torch.Tensor,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`q` `[heads, count, dim]` over the sequence so far -> `[count, heads, value_dim]`."""
    heads, count, dim = q.shape
    end = segment.position + count
    first = max(0, segment.position - window + 1) // BLOCK_TOKENS * BLOCK_TOKENS if window else 0
    k, v = segment.kv.read(batch.layer, first, padded(end, BLOCK_TOKENS))  # [kv_heads, length, dim]
    shared = heads // k.shape[0]
    stacked = count == 1 and shared > 1
    rows = shared if stacked else count
    tall = padded(rows, ROW_QUANTUM)
    mask = _mask(batch, segment.position, 1 if stacked else count, tall, first, k.shape[1], window, q.dtype)
    if softcap or sinks is not None:
        return _plain(q, k, v, mask, tall if not stacked else padded(1, ROW_QUANTUM), scale, softcap, sinks)
    queries = q.new_zeros(k.shape[0] if stacked else heads, tall, dim)
    queries[:, :rows] = q.view(k.shape[0], shared, dim) if stacked else q
    out = F.scaled_dot_product_attention(
        queries[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=shared > 1 and not stacked
    )[0, :, :rows]
    return out.reshape(1, heads, -1) if stacked else out.transpose(0, 1)


def _mask(
    batch: PackedBatch, position: int, count: int, tall: int, first: int, length: int, window: int, dtype: torch.dtype
) -> torch.Tensor:
    """`[1, 1, tall, length]`, 0 where a row may look and minus infinity elsewhere; rows past `count` copy the last one.

    Made once a batch and sequence, then shared by the layers with the same window.
    """
    key = (position, tall if count == 1 else -count, first, window)
    mask = batch.masks.get(key)
    if mask is None:
        last = position + count - 1
        rows = torch.arange(position, position + tall).clamp_(max=last)[:, None]
        columns = torch.arange(first, first + length)[None]
        hidden = columns > rows
        if window:
            hidden |= columns <= rows - window
        mask = torch.zeros(1, 1, tall, length, dtype=dtype).masked_fill_(hidden, float("-inf"))
        batch.masks[key] = mask
    return mask


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    tall: int,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with capped scores or sinks, in the padded shapes: `[count, heads, value_dim]`."""
    heads, count, dim = q.shape
    shared = heads // k.shape[0]
    keys, values = k.repeat_interleave(shared, 0).transpose(-1, -2), v.repeat_interleave(shared, 0)
    queries = q.new_zeros(heads, tall, dim)
    queries[:, :count] = q
    blocks = [slice(at, at + BLOCK_TOKENS) for at in range(0, k.shape[1], BLOCK_TOKENS)]
    tiles = []
    for row in range(0, tall, ROW_QUANTUM):  # one shape for every product: [heads, 8, dim] by [heads, dim, 512] and back
        tile = queries[:, row : row + ROW_QUANTUM]
        scores = torch.cat([tile @ keys[..., block] for block in blocks], -1) * scale  # [heads, 8, length]
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + mask[0, :, row : row + ROW_QUANTUM]
        if sinks is not None:
            scores = torch.cat([scores, sinks.reshape(-1, 1, 1).expand(heads, ROW_QUANTUM, 1).to(scores.dtype)], -1)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        out = weights[..., blocks[0]] @ values[:, blocks[0]]
        for block in blocks[1:]:
            out = out + weights[..., block] @ values[:, block]
        tiles.append(out)
    return torch.cat(tiles, 1)[:, :count].transpose(0, 1)


AttentionInterface.register(NAME, mesh_attention)
