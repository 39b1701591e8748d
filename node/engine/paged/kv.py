"""Keys and values in pages that belong to any sequence, on any device: what attention over block tables reads.

One pool a layer, `[pages, 256, kv_heads, dim]` each for keys and values; a sequence has the numbers of its pages. Page 0
belongs to no sequence: padding writes there, and shorter tables end with it. A page's values are zero when it is given out,
those of page 0 always, and those behind a sequence's end: what is masked is multiplied by zero, and zero times NaN is NaN.

Pools grow by doubling, a layer at a time, so that no more than one layer is held twice; a step that was recorded with
the old addresses learns of it by `generation`. How many sequences there may be is the scheduler's business, in blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch

from node.engine.kv.cache import Page
from node.engine.paged.plan import KV_PAGE_TOKENS, pages_for, slots_of

FIRST_PAGES = 16


class PagedStore:
    """The pools of one stage. Touched by one thread at a time, as the sequences in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generation = 0  # of the pools' addresses
        self._capacity = FIRST_PAGES
        self._free = list(range(FIRST_PAGES - 1, 0, -1))
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def pool(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[pages, 256, kv_heads, dim]`, made on first use for such as `like` `[rows, kv_heads, dim]`."""
        held = self._pools.get(layer)
        if held is None:
            shape = (self._capacity, KV_PAGE_TOKENS, *like.shape[1:])
            held = self._pools[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return held

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._pools.get(layer)

    @torch.inference_mode()
    def take(self, count: int) -> list[int]:
        """`count` pages, their values zero."""
        while len(self._free) < count:
            self._grow()
        taken = [self._free.pop() for _ in range(count)]
        if taken and self._pools:
            at = torch.tensor(taken, device=self.device)
            for _, values in self._pools.values():  # what the keys hold is masked before it counts
                values.index_fill_(0, at, 0.0)
        return taken

    @torch.inference_mode()
    def clear(self, slots: Iterable[int]) -> None:
        """Zeroes the values that lie there."""
        at = torch.tensor(list(slots), device=self.device)
        for _, values in self._pools.values():
            values.flatten(0, 1).index_fill_(0, at, 0.0)

    def release(self, pages: list[int]) -> None:
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
    """Keys and values of one sequence: passes for a `SequenceKV`. Its pages are free again once no reference is left."""

    def __init__(self, store: PagedStore) -> None:
        self._store = store
        self.pages: list[int] = []
        self._end = 0
        weakref.finalize(self, store.release, self.pages).atexit = False

    def expect(self, end: int) -> None:
        """Says that positions up to `end` are about to be written, in every layer, and that nothing behind counts any more."""
        if end < self._end:  # guesses that proved wrong: what is masked must be no NaN
            self._store.clear(slots_of(self.pages, end, self._end - end))
        self._end = end
        self.pages += self._store.take(max(0, pages_for(end) - len(self.pages)))

    def _slots(self, position: int, count: int) -> torch.Tensor:
        return torch.tensor(list(slots_of(self.pages, position, count)), device=self._store.device)

    @torch.inference_mode()
    def page(self, position: int, count: int, layers: Iterable[int]) -> Page:
        """As `SequenceKV.page`: a copy, on the same device."""
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
        """Begins the sequence with what the pages hold, on any device, one after the other from position 0 on."""
        counts = [next(iter(page.values())).shape[2] for page in pages]
        self.expect(sum(counts))
        slots = self._slots(0, sum(counts))
        for layer in pages[0]:
            whole = torch.cat([page[layer] for page in pages], 2).transpose(1, 2)  # [2, positions, kv_heads, dim]
            whole = whole.to(self._store.device)
            for side, pool in zip(whole, self._store.pool(layer, whole[0])):
                pool.flatten(0, 1)[slots] = side
