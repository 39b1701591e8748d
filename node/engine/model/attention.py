"""Causal attention over ragged packed rows, the same bits however a sequence was batched or chunked.

Registered with transformers as the attention of every model that uses `AttentionInterface`. A matrix kernel's rounding
depends on the shapes it is given, so the shapes depend on a row's position alone:

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

from node.engine.kv.blocks import BLOCK_TOKENS
from node.engine.kv.cache import STRETCH, SequenceKV, Slab
from node.engine.model.unservable import refuse_what_is_not_read
from node.engine.paged.attention import PagedStep

NAME = "mesh"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # what SDPA would choose, at less cost
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
    """Rows of one sequence within one stretch, and the keys they meet: positions `first … first + length - 1`."""

    row: int
    count: int
    kv: SequenceKV
    first: int
    length: int
    position: int
    mask: torch.Tensor | None = None  # [1, 1, 1 or padded rows, length]: 0 where a row may look, else minus infinity


@dataclass(slots=True)
class SlabNeighbours:
    """Decoding rows, a row a sequence, whose keys lie in neighbouring slots of a slab; or one whose keys lie elsewhere."""

    tiles: list[AttentionTile]
    mask: torch.Tensor  # [tiles, 1, 1, length]

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of keys and values `[tiles, kv_heads, length, dim]`."""
        tile = self.tiles[0]
        place = tile.kv.place
        if len(self.tiles) == 1 or place is None:
            return tile.kv.read(layer, tile.first, tile.length)
        return place.slab.read(layer, place.slot, len(self.tiles), tile.first, tile.length)


@dataclass(slots=True)
class KvReads:
    """How the rows of a batch look at what is stored, for all layers with the same window."""

    decoding: list[SlabNeighbours]
    decoding_rows: slice | torch.Tensor  # in the order of `decoding`
    decoding_count: int
    prefilling: list[AttentionTile]
    workspace: Workspace | None = None


class Workspace:
    """Tensors and views that all layers with the same window and shapes use one after the other.

    Making them anew in each layer cost a twentieth of a step at batch 1: a view takes 5 to 10 microseconds once a
    matrix product has swept the caches.
    """

    def __init__(self, reading: KvReads, q: torch.Tensor, kv_heads: int) -> None:
        heads, dim = q.shape[1:]
        shared, count = heads // kv_heads, reading.decoding_count
        self.shape = q.shape
        self.kv_heads = kv_heads
        self.out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        stacked = q.new_zeros(count, kv_heads, padded(shared, ROW_QUANTUM), dim)
        self.queries = stacked[:, :, :shared]
        at = reading.decoding_rows
        self.answers = self.out[at].view(count, kv_heads, shared, dim) if isinstance(at, slice) else None
        self.runs: list[tuple[SlabNeighbours, torch.Tensor, torch.Tensor | None]] = []
        row = 0
        for near in reading.decoding:
            rows = slice(row, row + len(near.tiles))
            self.runs.append((near, stacked[rows], None if self.answers is None else self.answers[rows]))
            row += len(near.tiles)


@dataclass(slots=True)
class KvWrites:
    """Decoding rows that share a slab: their new keys and values are stored by one call."""

    slab: Slab
    rows: slice | torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor


@dataclass(slots=True)
class PackedBatch:
    """What the layers of one forward share. `layer` is set as the forward goes along."""

    segments: list[Segment]
    start: int
    end: int
    hidden: torch.Tensor | None = None  # [1, rows, hidden]: what stands before layer `start`
    captured: torch.Tensor | None = None  # [1, rows, hidden]: what came out of layer `end - 1`
    layer: int = -1
    shared: list[KvWrites] = field(default_factory=list)
    apart: list[Segment] = field(default_factory=list)
    readings: dict[int, KvReads] = field(default_factory=dict)
    sorted_out: bool = False
    paged: PagedStep | None = None  # on other devices: keys and values are in pages, which the segments have been given

    @property
    def windows(self) -> set[int]:
        """Those through which attention was asked to look."""
        return {*self.readings} if self.paged is None else self.paged.windows

    def __post_init__(self) -> None:
        for segment in self.segments:
            segment.kv.expect(segment.position + segment.count)

    def _sort_out(self) -> None:
        """Which rows are stored together, which each for itself; the compiled layers never ask."""
        self.sorted_out = True
        by_slab: dict[int, list[Segment]] = {}
        for segment in self.segments:
            end = segment.position + segment.count
            if segment.count == 1 and segment.kv.in_slab and end <= BLOCK_TOKENS and segment.kv.place is not None:
                by_slab.setdefault(id(segment.kv.place.slab), []).append(segment)
            else:
                self.apart.append(segment)
        for together in by_slab.values():
            places = [segment.kv.place for segment in together if segment.kv.place is not None]
            self.shared.append(
                KvWrites(
                    places[0].slab,
                    row_index([segment.row for segment in together]),
                    torch.tensor([place.slot for place in places]),
                    torch.tensor([segment.position for segment in together]),
                )
            )

    def write(self, kv: torch.Tensor) -> None:
        """Stores this layer's `[rows, 2, kv_heads, dim]`."""
        if not self.sorted_out:
            self._sort_out()
        for writing in self.shared:
            writing.slab.put(self.layer, (writing.slots, writing.positions), kv[writing.rows])
        for segment in self.apart:
            segment.kv.write(self.layer, segment.position, kv[segment.row : segment.row + segment.count])

    def reading(self, window: int, dtype: torch.dtype) -> KvReads:
        """Made once for all layers with the same window (0: none)."""
        made = self.readings.get(window)
        if made is None:
            tiles = [tile for segment in self.segments for tile in _batch(segment, window)]
            singles = sorted((tile for tile in tiles if tile.count == 1), key=_neighbourhood)
            longer = [tile for tile in tiles if tile.count > 1]
            for tile in longer:
                tile.mask = _mask([tile.position - tile.first], tile.count, tile.length, window, dtype)
            decoding = [_neighbours(run, window, dtype) for run in _runs(singles)]
            made = KvReads(decoding, row_index([tile.row for tile in singles]), len(singles), longer)
            self.readings[window] = made
        return made


def row_index(rows: list[int]) -> slice | torch.Tensor:
    """A slice, which copies nothing, where the rows stand in one piece and in order."""
    if rows and rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.long)


def _neighbourhood(tile: AttentionTile) -> tuple[int, int, int, int]:
    place = tile.kv.place
    if place is None or not tile.kv.in_slab:
        return 0, tile.row, 0, 0
    return id(place.slab), tile.first, tile.length, place.slot


def _runs(singles: list[AttentionTile]) -> Iterator[list[AttentionTile]]:
    """Splits decoding rows where the next one's keys are no neighbour of the last one's."""
    run: list[AttentionTile] = []
    before: tuple[int, int, int, int] | None = None
    for tile in singles:
        here = _neighbourhood(tile)
        if run and (here[0] == 0 or before != (*here[:3], here[3] - 1)):
            yield run
            run = []
        run.append(tile)
        before = here
    if run:
        yield run


def _neighbours(run: list[AttentionTile], window: int, dtype: torch.dtype) -> SlabNeighbours:
    mask = _mask([tile.position - tile.first for tile in run], 1, run[0].length, window, dtype)
    for number, tile in enumerate(run):
        tile.mask = mask[number : number + 1]
    return SlabNeighbours(run, mask)


_thread = threading.local()  # load's self-check runs beside the engine thread


def set_batch(batch: PackedBatch | None) -> None:
    """The batch that the attention of this thread's forward works on."""
    _thread.batch = batch


def running_rows() -> int:
    """Rows of this thread's batch that belong to a sequence; the last of them is followed by padding alone."""
    batch: PackedBatch = _thread.batch
    return max(segment.row + segment.count for segment in batch.segments)


def padded(tokens: int, quantum: int) -> int:
    return -(-tokens // quantum) * quantum


def _batch(segment: Segment, window: int) -> Iterator[AttentionTile]:
    position, end = segment.position, segment.position + segment.count
    while position < end:
        stretch = position // STRETCH * STRETCH
        upto = min(end, stretch + STRETCH)
        first = max(0, stretch - window + 1) // STRETCH * STRETCH if window else 0
        row = segment.row + position - segment.position
        yield AttentionTile(row, upto - position, segment.kv, first, stretch + STRETCH - first, position)
        position = upto


def _mask(positions: list[int], count: int, length: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """`[tiles, 1, rows, length]` for tiles of `count` rows that begin at `positions` of their keys.

    Rows past `count` (padding) copy the last one; a single row serves all of its copies.
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
    """`query` `[1, heads, rows, dim]`, `key` and `value` `[1, kv_heads, rows, dim]`, positions already applied.

    Returns `[1, rows, heads, value_dim]`. Rows outside every segment come out as zeros.

    Raises:
        Unservable: the model wants more of attention than is computed here.
    """
    refuse_what_is_not_read(module, attention_mask, unused)
    value_dim = value.shape[-1]
    rows = [side[0].transpose(0, 1) for side in _equal_dims(query, key, value)]
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
    """Stores `kv` `[rows, 2 * kv_heads, dim]` (keys, then values), then answers `q` `[rows, heads, dim]` in its own shape.

    Rows outside every segment come out as zeros. The answer is good until the next layer's.
    """
    if batch.paged is not None:
        return batch.paged.attend(batch.layer, q, kv, scale, window, softcap, sinks)
    kv_heads = kv.shape[1] // 2
    batch.write(kv.view(-1, 2, kv_heads, kv.shape[2]))
    reading = batch.reading(window, q.dtype)
    if softcap or sinks is not None:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for tile in [*(tile for near in reading.decoding for tile in near.tiles), *reading.prefilling]:
            _attend_plainly(batch.layer, tile, q.transpose(0, 1), scale, softcap, sinks, out)
        return out
    space = reading.workspace
    if space is None or space.shape != q.shape or space.kv_heads != kv_heads:
        space = reading.workspace = Workspace(reading, q, kv_heads)
    if reading.decoding:
        _attend_decoding(batch.layer, reading, space, q, scale)
    for tile in reading.prefilling:
        _attend_prefilling(batch.layer, tile, q, kv_heads, scale, space.out)
    return space.out


def _equal_dims(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Zero columns make heads of unequal size equal, which the fused kernel wants; they add nothing."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [tensor if tensor.shape[-1] == widest else F.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in tensors]


def _attend_decoding(layer: int, reading: KvReads, space: Workspace, q: torch.Tensor, scale: float) -> None:
    """The decoding rows' answers; the heads of each KV head are stacked as rows."""
    rows = reading.decoding_rows
    space.queries.copy_(q[rows].view(space.queries.shape))
    apart = []
    for near, queries, target in space.runs:
        keys, values = near.read(layer)
        answer = _flash(queries, keys, values, 0.0, False, attn_mask=near.mask, scale=scale)[0]
        answer = answer[:, :, : space.queries.shape[2]]
        if target is None:
            apart.append(answer)
        else:
            target.copy_(answer)
    if apart:
        space.out[rows] = torch.cat(apart).reshape(-1, *q.shape[1:])


def _attend_prefilling(layer: int, tile: AttentionTile, q: torch.Tensor, kv_heads: int, scale: float, out: torch.Tensor) -> None:
    """The rows of one tile; `q` `[rows, heads, dim]`."""
    assert tile.mask is not None
    heads = q.shape[1]
    queries = F.pad(q[tile.row : tile.row + tile.count].transpose(0, 1), (0, 0, 0, tile.mask.shape[2] - tile.count))[None]
    keys, values = tile.kv.read(layer, tile.first, tile.length)
    answer = F.scaled_dot_product_attention(queries, keys, values, attn_mask=tile.mask, scale=scale, enable_gqa=heads > kv_heads)
    out[tile.row : tile.row + tile.count] = answer[0, :, : tile.count].transpose(0, 1)


def _attend_plainly(
    layer: int,
    tile: AttentionTile,
    q: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Capped scores or sinks: `q` `[heads, rows, dim]`; each product is `[heads, 8, dim]` by `[heads, dim, 128]` or back."""
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
