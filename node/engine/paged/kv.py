"""A paged store of keys and values, on any device, for attention over block tables.

Each layer has one pool `[pages, 256, kv_heads, dim]` for keys and one for values; a sequence has a list of page numbers. Page
0 belongs to no sequence: padding writes there, and shorter tables end with it. The values of a page are zero when it is
allocated, and always in page 0 and after a sequence's end: masked values are multiplied by zero, and zero times NaN is NaN.

Pools grow by doubling, one layer at a time, so that no more than one layer is held twice; `generation` changes with their
addresses, which recorded steps depend on. The scheduler limits the number of sequences, in blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch

from node.engine.kv.cache import Page
from node.engine.paged.plan import KV_PAGE_TOKENS, pages_for, slots_of

FIRST_PAGES = 16


class PagedStore:
    """The pools of one stage. Only one thread at a time may use it and its sequences."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generation = 0  # of the pools' addresses
        self._capacity = FIRST_PAGES
        self._free = list(range(FIRST_PAGES - 1, 0, -1))
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def pool(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the pools of keys and values, each `[pages, 256, kv_heads, dim]`; makes them for rows like `like` if needed."""
        held = self._pools.get(layer)
        if held is None:
            shape = (self._capacity, KV_PAGE_TOKENS, *like.shape[1:])
            held = self._pools[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return held

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns the pools of a layer, or None where nothing was stored in it yet."""
        return self._pools.get(layer)

    @torch.inference_mode()
    def take(self, count: int) -> list[int]:
        """Allocates `count` pages; their values are zero."""
        while len(self._free) < count:
            self._grow()
        taken = [self._free.pop() for _ in range(count)]
        assert 0 not in taken, "page 0 is for padding"
        if taken and self._pools:
            at = torch.tensor(taken, device=self.device)
            for _, values in self._pools.values():  # not the keys: their scores are replaced by the mask, even NaN
                values.index_fill_(0, at, 0.0)
        return taken

    @torch.inference_mode()
    def clear(self, slots: Iterable[int]) -> None:
        """Sets the values in these slots to zero."""
        at = torch.tensor(list(slots), device=self.device)
        for _, values in self._pools.values():
            values.flatten(0, 1).index_fill_(0, at, 0.0)

    def release(self, pages: list[int]) -> None:
        """Frees pages."""
        self._free += reversed(pages)

    def _grow(self) -> None:
        self.generation += 1
        before, self._capacity = self._capacity, 2 * self._capacity
        self._free = [*range(self._capacity - 1, before - 1, -1), *self._free]
        for layer in list(self._pools):
            keys, values = self._pools.pop(layer)
            self._pools[layer] = self._wider(keys), self._wider(values)

    def _wider(self, pool: torch.Tensor) -> torch.Tensor:
        wider = pool.new_zeros(self._capacity, *pool.shape[1:])
        wider[: pool.shape[0]] = pool
        return wider


class PagedKV:
    """Keys and values of one sequence, with the interface of `SequenceKV`. Its pages are freed when the object is."""

    def __init__(self, store: PagedStore) -> None:
        self._store = store
        self.pages: list[int] = []
        self._end = 0
        weakref.finalize(self, store.release, self.pages).atexit = False

    def expect(self, end: int) -> None:
        """Allocates pages for the positions before `end`, which will be written in every layer; later positions are dropped."""
        if end < self._end:  # rejected drafts: masked values must be no NaN
            self._store.clear(slots_of(self.pages, end, self._end - end))
        self._end = end
        self.pages += self._store.take(max(0, pages_for(end) - len(self.pages)))

    def _slots(self, position: int, count: int) -> torch.Tensor:
        return torch.tensor(list(slots_of(self.pages, position, count)), device=self._store.device)

    @torch.inference_mode()
    def page(self, position: int, count: int, layers: Iterable[int]) -> Page:
        """As `SequenceKV.page`: returns a copy, on the same device."""
        slots = self._slots(position, count)
        copied = {}
        for layer in layers:
            held = self._store.held(layer)
            if held is not None:
                sides = [side.flatten(0, 1)[slots].transpose(0, 1) for side in held]  # [kv_heads, positions, dim]
                copied[layer] = torch.stack(sides)
        return copied

    @torch.inference_mode()
    def restore(self, pages: Sequence[Page]) -> None:
        """Begins the sequence with copied pages, from any device, in order from position 0 on."""
        counts = [next(iter(page.values())).shape[2] for page in pages]
        self.expect(sum(counts))
        slots = self._slots(0, sum(counts))
        for layer in pages[0]:
            whole = torch.cat([page[layer] for page in pages], 2).transpose(1, 2)  # [2, positions, kv_heads, dim]
            whole = whole.to(self._store.device)
            for side, pool in zip(whole, self._store.pool(layer, whole[0])):
                pool.flatten(0, 1)[slots] = side
