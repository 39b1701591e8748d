"""Causal attention over ragged packed rows, with the same bits however a sequence is batched or chunked.

Registered with transformers as the attention of every model that uses `AttentionInterface`. A matrix kernel's rounding
depends on the shapes of its operands, so here the shapes depend on a row's position alone:

1. A query reads the keys up to the end of its own *stretch* of 128 positions; those after the query are masked. A prefill
   is split at the ends of stretches, which also saves half of the masked work. (Padding all queries of a chunk to one
   multiple of 512 is exact too, but makes the attention of short contexts four times as slow.)
2. Query rows are padded to a multiple of 8, for a single row would be computed by another kernel than several rows.
3. One-token queries that share a KV head are stacked as rows of that head, so each KV head is read once. This changes no
   bit, for a row's result does not depend on its place among the rows.

Soft-capped scores and attention sinks have no fused kernel: they are computed by plain matrix products of one fixed shape.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from node.engine.kv.blocks import BLOCK_TOKENS
from node.engine.kv.cache import STRETCH, SequenceKV, Slab
from node.engine.model.unservable import refuse_unsupported_arguments
from node.engine.paged.attention import PagedStep

NAME = "mesh"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # SDPA calls it too, after costly checks
ROW_QUANTUM = 8


@dataclass(slots=True)
class Segment:
    """The rows `[row, row + count)` of a packed batch: one sequence's positions `position … position + count - 1`."""

    row: int
    count: int
    position: int
    kv: SequenceKV


@dataclass(slots=True)
class AttentionTile:
    """Rows of one sequence within one stretch, and the keys that they read: positions `first … first + length - 1`."""

    row: int
    count: int
    kv: SequenceKV
    first: int
    length: int
    position: int
    mask: torch.Tensor | None = None  # [1, 1, 1 or padded rows, length]: 0 for keys that a row reads, else minus infinity


@dataclass(slots=True)
class SlabNeighbours:
    """Decoding rows, one per sequence, whose keys lie in consecutive slots of a slab; or a single row with keys elsewhere."""

    tiles: list[AttentionTile]
    mask: torch.Tensor  # [tiles, 1, 1, length]

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of keys and values, each `[tiles, kv_heads, length, dim]`."""
        tile = self.tiles[0]
        place = tile.kv.place
        if len(self.tiles) == 1 or place is None:
            return tile.kv.read(layer, tile.first, tile.length)
        return place.slab.read(layer, place.slot, len(self.tiles), tile.first, tile.length)


@dataclass(slots=True)
class KvReads:
    """How the rows of a batch read stored keys and values, for all layers with the same window."""

    decoding: list[SlabNeighbours]
    decoding_rows: slice | torch.Tensor  # in the order of `decoding`
    decoding_count: int
    prefilling: list[AttentionTile]
    workspace: Workspace | None = None


class Workspace:
    """Tensors and views that all layers with the same window and shapes use one after the other.

    Making them in each layer would take a twentieth of a step at batch 1: a view takes 5 to 10 microseconds after a
    matrix product has evicted the caches.
    """

    def __init__(self, reads: KvReads, q: torch.Tensor, kv_heads: int) -> None:
        heads, dim = q.shape[1:]
        shared, count = heads // kv_heads, reads.decoding_count
        self.shape = q.shape
        self.kv_heads = kv_heads
        self.out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        stacked = q.new_zeros(count, kv_heads, padded(shared, ROW_QUANTUM), dim)
        self.queries = stacked[:, :, :shared]
        at = reads.decoding_rows
        self.answers = self.out[at].view(count, kv_heads, shared, dim) if isinstance(at, slice) else None
        self.runs: list[tuple[SlabNeighbours, torch.Tensor, torch.Tensor | None]] = []
        row = 0
        for near in reads.decoding:
            rows = slice(row, row + len(near.tiles))
            self.runs.append((near, stacked[rows], None if self.answers is None else self.answers[rows]))
            row += len(near.tiles)


@dataclass(slots=True)
class KvWrites:
    """Decoding rows whose sequences share a slab: their new keys and values are stored by one call."""

    slab: Slab
    rows: slice | torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor


@dataclass(slots=True)
class PackedBatch:
    """State that the layers of one forward share. `layer` is set to the layer that is computed."""

    segments: list[Segment]
    start: int
    end: int
    hidden: torch.Tensor | None = None  # [1, rows, hidden]: the input of layer `start`
    captured: torch.Tensor | None = None  # [1, rows, hidden]: the output of layer `end - 1`
    layer: int = -1
    slab_writes: list[KvWrites] = field(default_factory=list)
    single_writes: list[Segment] = field(default_factory=list)
    kv_reads: dict[int, KvReads] = field(default_factory=dict)
    writes_grouped: bool = False
    paged: PagedStep | None = None  # on other devices: keys and values are in pages

    @property
    def windows(self) -> set[int]:
        """The sliding windows that attention has used in this forward; 0: all positions."""
        return {*self.kv_reads} if self.paged is None else self.paged.windows

    def __post_init__(self) -> None:
        for segment in self.segments:
            segment.kv.expect(segment.position + segment.count)

    def _group_writes(self) -> None:
        """Groups the rows whose keys and values one call can store. Not called for compiled layers, which store by themselves."""
        self.writes_grouped = True
        by_slab: dict[int, list[Segment]] = {}
        for segment in self.segments:
            end = segment.position + segment.count
            if segment.count == 1 and segment.kv.in_slab and end <= BLOCK_TOKENS and segment.kv.place is not None:
                by_slab.setdefault(id(segment.kv.place.slab), []).append(segment)
            else:
                self.single_writes.append(segment)
        for together in by_slab.values():
            places = [segment.kv.place for segment in together if segment.kv.place is not None]
            self.slab_writes.append(
                KvWrites(
                    places[0].slab,
                    row_index([segment.row for segment in together]),
                    torch.tensor([place.slot for place in places]),
                    torch.tensor([segment.position for segment in together]),
                )
            )

    def write(self, kv: torch.Tensor) -> None:
        """Stores this layer's keys and values `[rows, 2, kv_heads, dim]`."""
        assert self.start <= self.layer < self.end, "the running layer is one of this forward"
        if not self.writes_grouped:
            self._group_writes()
        for writing in self.slab_writes:
            writing.slab.put(self.layer, (writing.slots, writing.positions), kv[writing.rows])
        for segment in self.single_writes:
            segment.kv.write(self.layer, segment.position, kv[segment.row : segment.row + segment.count])

    def reads_for(self, window: int, dtype: torch.dtype) -> KvReads:
        """Returns how rows read keys and values through `window` (0: all positions), made once for all layers with it."""
        made = self.kv_reads.get(window)
        if made is None:
            tiles = [tile for segment in self.segments for tile in tiles_of(segment, window)]
            singles = sorted((tile for tile in tiles if tile.count == 1), key=_slab_position)
            longer = [tile for tile in tiles if tile.count > 1]
            for tile in longer:
                tile.mask = _mask([tile.position - tile.first], tile.count, tile.length, window, dtype)
            decoding = [_slab_neighbours(run, window, dtype) for run in _runs(singles)]
            made = KvReads(decoding, row_index([tile.row for tile in singles]), len(singles), longer)
            self.kv_reads[window] = made
        return made


def row_index(rows: list[int]) -> slice | torch.Tensor:
    """Returns a slice, which indexes without a copy, where the rows are consecutive; else an index tensor."""
    if rows and rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.long)


def _slab_position(tile: AttentionTile) -> tuple[int, int, int, int]:
    place = tile.kv.place
    if place is None or not tile.kv.in_slab:
        return 0, tile.row, 0, 0
    return id(place.slab), tile.first, tile.length, place.slot


def _runs(singles: list[AttentionTile]) -> Iterator[list[AttentionTile]]:
    """Splits decoding rows into runs whose keys lie in consecutive slots of a slab."""
    run: list[AttentionTile] = []
    before: tuple[int, int, int, int] | None = None
    for tile in singles:
        here = _slab_position(tile)
        if run and (here[0] == 0 or before != (*here[:3], here[3] - 1)):
            yield run
            run = []
        run.append(tile)
        before = here
    if run:
        yield run


def _slab_neighbours(run: list[AttentionTile], window: int, dtype: torch.dtype) -> SlabNeighbours:
    mask = _mask([tile.position - tile.first for tile in run], 1, run[0].length, window, dtype)
    for number, tile in enumerate(run):
        tile.mask = mask[number : number + 1]
    return SlabNeighbours(run, mask)


_thread = threading.local()  # the self-check of a load runs in another thread than the engine


def set_running_batch(batch: PackedBatch | None) -> None:
    """Sets the batch that the attention of this thread's forward computes."""
    _thread.batch = batch


def running_sequence_rows() -> int:
    """Returns how many rows of this thread's batch come before its padding."""
    batch: PackedBatch = _thread.batch
    return max(segment.row + segment.count for segment in batch.segments)


def padded(tokens: int, quantum: int) -> int:
    return -(-tokens // quantum) * quantum


def tiles_of(segment: Segment, window: int) -> Iterator[AttentionTile]:
    """Splits a segment at the ends of stretches; yields a tile for each, without its mask. `window`: 0: all positions."""
    position, end = segment.position, segment.position + segment.count
    while position < end:
        stretch = position // STRETCH * STRETCH
        upto = min(end, stretch + STRETCH)
        first = max(0, stretch - window + 1) // STRETCH * STRETCH if window else 0
        row = segment.row + position - segment.position
        yield AttentionTile(row, upto - position, segment.kv, first, stretch + STRETCH - first, position)
        position = upto


def _mask(positions: list[int], count: int, length: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the mask `[tiles, 1, rows, length]` of tiles of `count` rows that begin at `positions` of their keys.

    Rows beyond `count` (padding) repeat the last row; a single row is broadcast to its copies.
    """
    tall = padded(count, ROW_QUANTUM) if count > 1 else 1
    rows = torch.tensor(positions)[:, None, None, None] + torch.arange(tall).clamp_(max=count - 1)[:, None]
    columns = torch.arange(length)
    hidden = columns > rows
    if window:
        hidden |= columns <= rows - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


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
    """Computes attention for a transformers module, over the running batch of this thread.

    `query` `[1, heads, rows, dim]`, `key` and `value` `[1, kv_heads, rows, dim]`, with positions applied. Returns
    `[1, rows, heads, value_dim]`; rows outside every segment are zeros.

    Raises:
        Unservable: the model passes an argument that changes attention and is not supported.
    """
    refuse_unsupported_arguments(module, attention_mask, unused)
    value_dim = value.shape[-1]
    rows = [side[0].transpose(0, 1) for side in _padded_to_one_dim(query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(_thread.batch, rows[0], torch.cat(rows[1:], 1), scale, sliding_window or 0, softcap, s_aux)
    return out[None, ..., :value_dim], None


def attend(
    batch: PackedBatch,
    q: torch.Tensor,
    kv: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stores `kv` `[rows, 2 * kv_heads, dim]` (keys, then values), then computes attention for `q` `[rows, heads, dim]`.

    Returns a tensor like `q`, which the next layer's call overwrites. Rows outside every segment are zeros.
    """
    if batch.paged is not None:
        return batch.paged.attend(batch.layer, q, kv, scale, window, softcap, sinks)
    kv_heads = kv.shape[1] // 2
    batch.write(kv.view(-1, 2, kv_heads, kv.shape[2]))
    reads = batch.reads_for(window, q.dtype)
    if softcap or sinks is not None:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for tile in [*(tile for near in reads.decoding for tile in near.tiles), *reads.prefilling]:
            _attend_unfused(batch.layer, tile, q.transpose(0, 1), scale, softcap, sinks, out)
        return out
    workspace = reads.workspace
    if workspace is None or workspace.shape != q.shape or workspace.kv_heads != kv_heads:
        workspace = reads.workspace = Workspace(reads, q, kv_heads)
    if reads.decoding:
        _attend_decoding(batch.layer, reads, workspace, q, scale)
    for tile in reads.prefilling:
        _attend_prefilling(batch.layer, tile, q, kv_heads, scale, workspace.out)
    return workspace.out


def _padded_to_one_dim(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Pads heads with zero columns to one size, which the fused kernel requires; zeros add nothing to any product."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [tensor if tensor.shape[-1] == widest else F.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in tensors]


def _attend_decoding(layer: int, reads: KvReads, workspace: Workspace, q: torch.Tensor, scale: float) -> None:
    """Computes the decoding rows; the query heads of each KV head are stacked as rows."""
    rows = reads.decoding_rows
    workspace.queries.copy_(q[rows].view(workspace.queries.shape))
    apart = []
    for near, queries, target in workspace.runs:
        keys, values = near.read(layer)
        answer = _flash(queries, keys, values, 0.0, False, attn_mask=near.mask, scale=scale)[0]
        answer = answer[:, :, : workspace.queries.shape[2]]
        if target is None:
            apart.append(answer)
        else:
            target.copy_(answer)
    if apart:
        workspace.out[rows] = torch.cat(apart).reshape(-1, *q.shape[1:])


def _attend_prefilling(layer: int, tile: AttentionTile, q: torch.Tensor, kv_heads: int, scale: float, out: torch.Tensor) -> None:
    """Computes the rows of one tile; `q` `[rows, heads, dim]`."""
    assert tile.mask is not None
    heads = q.shape[1]
    queries = F.pad(q[tile.row : tile.row + tile.count].transpose(0, 1), (0, 0, 0, tile.mask.shape[2] - tile.count))[None]
    keys, values = tile.kv.read(layer, tile.first, tile.length)
    answer = F.scaled_dot_product_attention(queries, keys, values, attn_mask=tile.mask, scale=scale, enable_gqa=heads > kv_heads)
    out[tile.row : tile.row + tile.count] = answer[0, :, : tile.count].transpose(0, 1)


def _attend_unfused(
    layer: int,
    tile: AttentionTile,
    q: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Computes one tile with soft-capped scores or sinks; `q` `[heads, rows, dim]`.

    Each product is `[heads, 8, dim]` by `[heads, dim, 128]`, or `[heads, 8, 128]` by `[heads, 128, dim]`.
    """
    assert tile.mask is not None
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
