"""The tensors of keys and values: short sequences side by side in shared slabs, longer ones in a buffer of their own.

A sequence's first block (512 tokens) is a slot of a slab `[2, slots, kv_heads, 512, dim]` (keys, then values), with one tensor
for each layer. So one attention call serves all decoding sequences in neighbouring slots, and one write stores their new keys:
with a call for each sequence a step of 32 sequences took 54 ms on two cores. Slabs are mapped, not filled: the system provides a
memory page when a token is first written to it. A sequence that outgrows its slot moves to a buffer
`[2, 1, kv_heads, capacity, dim]`, which grows block by block: one copy in 512 tokens, under half a percent of what attention
reads in between.

Everything behind the end of a sequence is zero: attention masks it by a factor of zero, but 0 x NaN is NaN; and nothing of
another sequence may remain there.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Sequence

import torch

from node.engine.kv.blocks import BLOCK_TOKENS, blocks_for
from node.engine.native.arena import mapped

Page = dict[int, torch.Tensor]
"""Keys and values of some positions of a sequence: layer -> `[2, kv_heads, positions, dim]`."""

STRETCH = 128  # positions: attention reads keys in whole stretches, so capacities are multiples of it
SLOTS = 16
MAX_VIEWS = 4096  # of one slab


class Slab:
    """Slots for the first blocks of `SLOTS` sequences, in every layer that they use."""

    def __init__(self) -> None:
        self.free = list(range(SLOTS))
        self.layers: dict[int, torch.Tensor] = {}
        self._targets: dict[int, torch.Tensor] = {}
        self._views: dict[tuple[int, int, int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._starts: dict[range, torch.Tensor] = {}

    def layer(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Returns `[2, slots, kv_heads, 512, dim]`, created on first use in the form of `like` `[rows, 2, kv_heads, dim]`."""
        held = self.layers.get(number)
        if held is None:
            shape = (2, SLOTS, like.shape[2], BLOCK_TOKENS, like.shape[3])
            held = self.layers[number] = _mapped_zeros(shape, like.dtype)
        return held

    def starts(self, layers: range, like: torch.Tensor) -> torch.Tensor:
        """Returns the addresses of the keys and values of slot 0, `[2, layers]` int64."""
        found = self._starts.get(layers)
        if found is None:
            held = [self.layer(number, like) for number in layers]
            found = self._starts[layers] = torch.tensor([[side[at].data_ptr() for side in held] for at in (0, 1)])
        return found

    def put(self, number: int, at: tuple[torch.Tensor, torch.Tensor], kv: torch.Tensor) -> None:
        """Stores `kv` `[rows, 2, kv_heads, dim]` of layer `number`; `at`: the slots `[rows]` and positions `[rows]`."""
        target = self._targets.get(number)
        if target is None:
            target = self._targets[number] = self.layer(number, kv).permute(1, 3, 0, 2, 4)
        target.index_put_(at, kv)

    def read(self, number: int, slot: int, slots: int, first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of keys and values, `[slots, kv_heads, length, dim]`; cached: five views take as long as an addition."""
        key = number, slot, slots, first, length
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            keys, values = self.layers[number][:, slot : slot + slots, :, first : first + length].unbind(0)
            views = self._views[key] = keys, values
        return views

    @torch.inference_mode()
    def clear(self, slot: int, tokens: int) -> None:
        """Sets the first `tokens` positions of a slot to zero, in every layer."""
        for held in self.layers.values():
            held[:, slot, :, :tokens].zero_()


def _mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns zeros in small memory pages, which take no memory until they are written: most slots are empty."""
    size_bytes = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class KVStore:
    """The slabs of one stage. One thread at a time may use it and its sequences."""

    def __init__(self) -> None:
        self._slabs: list[Slab] = []

    def take(self) -> tuple[Slab, int]:
        """Returns the lowest free slot, so that running sequences are neighbours."""
        slab = next((slab for slab in self._slabs if slab.free), None)
        if slab is None:
            slab = Slab()
            self._slabs.append(slab)
        slot = min(slab.free)
        slab.free.remove(slot)
        assert 0 <= slot < SLOTS
        return slab, slot

    def release(self, slab: Slab, slot: int, tokens: int) -> None:
        assert slot not in slab.free
        slab.free.append(slot)
        if len(slab.free) == SLOTS:
            self._slabs.remove(slab)
        else:
            slab.clear(slot, tokens)


class SlabSlot:
    """A slot that one sequence holds. `tokens`: how many of its positions may have been written."""

    def __init__(self, store: KVStore) -> None:
        self.slab, self.slot = store.take()
        self.tokens = 0
        self._store = store

    def release(self) -> None:
        self._store.release(self.slab, self.slot, self.tokens)


class SequenceKV:
    """Keys and values of one sequence on the layers that it uses here. Its slot is released when the object is collected."""

    def __init__(self, store: KVStore) -> None:
        self.place: SlabSlot | None = SlabSlot(store)  # None: the sequence has outgrown its slot
        self._release_slot = weakref.finalize(self, self.place.release)
        self._release_slot.atexit = False
        self._buffers: dict[int, torch.Tensor] = {}
        self._end = 0

    def expect(self, end: int) -> None:
        """Prepares for writing positions up to `end`, in every layer; positions behind `end` are discarded."""
        if end < self._end:
            self._zero(end, self._end)
        self._end = end
        if self.place is None:
            return
        if self._buffers and all(buffer.shape[3] >= end for buffer in self._buffers.values()):
            self.place = None  # every layer has moved to a buffer in the step before
            self._release_slot()
        else:
            self.place.tokens = max(self.place.tokens, min(end, BLOCK_TOKENS))

    def write(self, layer: int, position: int, kv: torch.Tensor) -> None:
        """Stores `[count, 2, kv_heads, dim]` (keys, values) from `position` on; writing a position again replaces its content."""
        end = position + kv.shape[0]
        self._with_capacity(layer, end, kv)[:, 0, :, position:end] = kv.permute(1, 2, 0, 3)

    def read(self, layer: int, first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of keys and values, `[1, kv_heads, length, dim]`, from position `first` to the end of a stretch."""
        held = self._buffers.get(layer)
        if held is None:
            assert self.place is not None
            return self.place.slab.read(layer, self.place.slot, 1, first, length)
        keys, values = held.narrow(3, first, length).unbind(0)
        return keys, values

    @torch.inference_mode()
    def _zero(self, position: int, end: int) -> None:
        """Sets the positions `position … end - 1` to zero: they held wrong guesses."""
        held = list(self._buffers.values())
        if not held and self.place is not None:
            slot = self.place.slot
            held = [layer[:, slot : slot + 1] for layer in self.place.slab.layers.values()]
        for layer in held:
            layer[:, :, :, position:end].zero_()

    def addresses(self, layers: range, end: int, like: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Returns the addresses of keys and values, `[2, layers]` int64, and the capacity of a KV head: at least `end` positions.

        `like`: a tensor `[…, 2, kv_heads, dim]` of the form that is written. The addresses are valid until the next `expect`.
        """
        if self.place is not None and self.in_slab and end <= BLOCK_TOKENS:
            slot_bytes = like.shape[2] * BLOCK_TOKENS * like.shape[3] * like.itemsize
            return self.place.slab.starts(layers, like) + self.place.slot * slot_bytes, BLOCK_TOKENS
        # Layers that were used before may be larger: the second pass makes all of them as large as the largest.
        end = max(self._with_capacity(number, end, like).shape[3] for number in layers)
        held = [self._with_capacity(number, end, like) for number in layers]
        return torch.tensor([[side[at].data_ptr() for side in held] for at in (0, 1)]), end

    @torch.inference_mode()
    def page(self, position: int, count: int, layers: Iterable[int]) -> Page:
        """Returns a copy of `position … position + count - 1`; layers that store nothing are left out."""
        copied = {}
        for layer in layers:
            held = self._held(layer)
            if held is not None:
                copied[layer] = held[:, 0, :, position : position + count].clone(memory_format=torch.contiguous_format)
        return copied

    @torch.inference_mode()
    def restore(self, pages: Sequence[Page]) -> None:
        """Copies the pages into the sequence, one after another from position 0 on."""
        end = sum(next(iter(page.values())).shape[2] for page in pages)
        self.expect(end)
        for layer, first in pages[0].items():
            target = self._with_capacity(layer, end, first.permute(2, 0, 1, 3))
            position = 0
            for page in pages:
                part = page[layer]
                target[:, 0, :, position : position + part.shape[2]] = part
                position += part.shape[2]

    def _held(self, layer: int) -> torch.Tensor | None:
        """Returns `[2, 1, kv_heads, capacity, dim]`, or None if the layer was never written."""
        if layer in self._buffers or self.place is None:
            return self._buffers.get(layer)
        held = self.place.slab.layers.get(layer)
        return None if held is None else held[:, self.place.slot : self.place.slot + 1]

    @property
    def in_slab(self) -> bool:
        """Whether no layer has moved to a buffer."""
        return not self._buffers

    def _with_capacity(self, layer: int, end: int, like: torch.Tensor) -> torch.Tensor:
        """Returns `[2, 1, kv_heads, capacity, dim]` with a capacity of at least `end`, moved to a larger buffer if needed."""
        held = self._held(layer)
        if held is None:
            assert self.place is not None
            slot = self.place.slot
            held = self.place.slab.layer(layer, like)[:, slot : slot + 1]
        if held.shape[3] < end:
            shape = (2, 1, like.shape[2], blocks_for(end) * BLOCK_TOKENS, like.shape[3])
            grown = torch.frombuffer(mapped(torch.Size(shape).numel() * like.itemsize), dtype=like.dtype).view(shape)
            grown[:, :, :, : held.shape[3]] = held
            assert grown.shape[3] >= end
            self._buffers[layer] = held = grown
        return held
