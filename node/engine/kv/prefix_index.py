"""The index of pages: keys and values of earlier sequences, kept for later sequences that begin with the same tokens. No torch.

A page holds the keys and values of `PREFIX_PAGE_TOKENS` whole tokens in the layers `[start, end)`, named after all tokens up to
its end (`mesh.prefix`). Memory that no sequence needs holds pages; a sequence that needs a block takes it from the pages that
were used longest ago. A page is pinned from the decision to read it until it was read. A page that must give up its memory is
*spilled* where there is room for that (`spill`): it is found as before, and holds no block; of the spilled pages the one that was
spilled or used longest ago is dropped first.

A page is copied into a sequence, not shared with it: attention on a CPU reads the keys of a sequence as one piece, and copying
a token costs a thousandth of computing it. So pages never change, and reading a page needs no lock against writers.
Exactness: the bits of a page depend on its tokens alone, by the rules of `attention` and `linear`, as long as kernels of one kind
computed all of them; therefore the numerics are part of the name. Pages are numbered, and no number is used twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mesh.prefix import PREFIX_PAGE_TOKENS
from node.engine.api import Lane, SequenceKey
from node.engine.kv.blocks import BLOCK_TOKENS, BlockPool

PAGES_PER_BLOCK = BLOCK_TOKENS // PREFIX_PAGE_TOKENS


class PageName(NamedTuple):
    """Everything that the bits of a page depend on."""

    start: int
    end: int
    numerics: str  # of every stage of the path: activations carry the roundings of the kernels that computed them
    prefix: bytes


@dataclass(frozen=True, slots=True)
class PageCopy:
    """An instruction: keep positions `position … position + PREFIX_PAGE_TOKENS - 1` of a sequence as page `number`."""

    key: SequenceKey
    lane: Lane
    position: int
    number: int


@dataclass(slots=True)
class _Page:
    number: int
    readers: int = 0


class PageIndex:
    """The pages of one span, and the blocks that they take from its pool: one for each `PAGES_PER_BLOCK`, rounded up."""

    def __init__(self, pool: BlockPool, first_number: int = 0, max_spilled: int = 0) -> None:
        self._pool = pool
        self._resident: OrderedDict[PageName, _Page] = OrderedDict()  # the least recently used first
        self._spilled: OrderedDict[PageName, _Page] = OrderedDict()  # the first to be dropped first
        self._max_spilled = max_spilled
        self._newly_spilled: list[int] = []
        self._newly_dropped: list[int] = []
        self._names: dict[int, PageName] = {}
        self._blocks: list[int] = []
        self._next_number = first_number

    def __len__(self) -> int:
        return len(self._resident) + len(self._spilled)

    @property
    def spilled(self) -> int:
        return len(self._spilled)

    @property
    def blocks(self) -> int:
        """Blocks that hold resident pages; sequences can take those of pages without readers."""
        return len(self._blocks)

    @property
    def readers(self) -> int:
        """Pins on all pages."""
        return sum(page.readers for page in [*self._resident.values(), *self._spilled.values()])

    def find(self, names: Sequence[PageName]) -> list[int]:
        """Returns the numbers of the kept pages from the first name on, up to the first name without a page.

        Counts as a use of these pages. The first name is used last: the pages behind it are of no use without it, so they are
        to be evicted before it.
        """
        found = []
        for name in names:
            if name not in self:
                break
            found.append(self._page(name).number)
        for name in reversed(names[: len(found)]):
            (self._resident if name in self._resident else self._spilled).move_to_end(name)
        return found

    def pin(self, numbers: Iterable[int]) -> None:
        """Adds a reader to each page; a page with readers is neither evicted nor dropped."""
        for number in numbers:
            self._page(self._names[number]).readers += 1

    def unpin(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            page = self._page(self._names[number])
            assert page.readers > 0
            page.readers -= 1

    def _page(self, name: PageName) -> _Page:
        return self._resident.get(name) or self._spilled[name]

    def add(self, name: PageName) -> int | None:
        """Returns the number of a new page; None: the page is kept already, or there is no room.

        The caller stores the content before any plan that is made after this call runs.
        """
        if name in self:
            return None
        if len(self._resident) == len(self._blocks) * PAGES_PER_BLOCK:
            block = self._pool.take(1)
            if block is not None:
                self._blocks += block
            elif not self._evict_oldest():
                return None
        assert len(self._resident) < len(self._blocks) * PAGES_PER_BLOCK
        number = self._next_number
        self._next_number += 1
        self._resident[name] = _Page(number)
        self._names[number] = name
        return number

    def __contains__(self, name: PageName) -> bool:
        return name in self._resident or name in self._spilled

    def drop(self, number: int) -> None:
        """Drops a page without readers whose content could not be stored, or is lost; no effect for an unknown number."""
        name = self._names.pop(number, None)
        if name is not None:
            page = self._spilled.pop(name, None) or self._resident.pop(name)
            assert page.readers == 0
            self._newly_dropped.append(number)
            self._release_empty_blocks()

    def take(self, count: int) -> list[int] | None:
        """Returns blocks for a sequence, evicting pages as needed; None: too few blocks, and no page was evicted."""
        missing = count - self._pool.free
        # A pool that was made smaller may be over its size: that many blocks must be freed before one can be taken.
        if missing > 0 and not self._free_blocks(missing + max(0, self._pool.used - self._pool.total)):
            return None
        return self._pool.take(count)

    def apply_limits(self, max_spilled: int | None = None) -> None:
        """Evicts pages until the pool is within its size, and drops spilled pages above `max_spilled`; None: as before."""
        self._max_spilled = self._max_spilled if max_spilled is None else max_spilled
        while len(self._spilled) > self._max_spilled and self._drop_oldest_spilled():
            pass
        while self._pool.used > self._pool.total and self._evict_oldest():
            self._release_empty_blocks()

    def take_dropped(self) -> tuple[int, ...]:
        """Returns the pages dropped since the last call; the caller discards their content."""
        dropped, self._newly_dropped = tuple(self._newly_dropped), []
        return dropped

    def take_spilled(self) -> tuple[int, ...]:
        """Returns the pages spilled since the last call; the caller spills them before any plan made after this call runs."""
        spilled, self._newly_spilled = tuple(self._newly_spilled), []
        return spilled

    def _free_blocks(self, count: int) -> bool:
        """Evicts pages until `count` blocks are released; False: too many pages have readers, and none was evicted."""
        pinned = sum(page.readers > 0 for page in self._resident.values())
        releasable = len(self._blocks) - -(-pinned // PAGES_PER_BLOCK)
        if releasable < count:
            return False
        keep = len(self._blocks) - count
        while len(self._blocks) > keep:
            evicted = self._evict_oldest()
            assert evicted  # enough pages have no readers
            self._release_empty_blocks()
        return True

    def _evict_oldest(self) -> bool:
        """Spills, or else drops, the least recently used resident page without readers; False: every page has readers."""
        for name, page in self._resident.items():
            if page.readers == 0:
                del self._resident[name]
                if len(self._spilled) < self._max_spilled or (self._max_spilled and self._drop_oldest_spilled()):
                    self._spilled[name] = page
                    self._newly_spilled.append(page.number)
                else:
                    del self._names[page.number]
                    self._newly_dropped.append(page.number)
                return True
        return False

    def _drop_oldest_spilled(self) -> bool:
        for name, page in self._spilled.items():
            if page.readers == 0:
                del self._spilled[name], self._names[page.number]
                self._newly_dropped.append(page.number)
                return True
        return False

    def _release_empty_blocks(self) -> None:
        # Any block will do: pages are counted, not placed.
        while len(self._resident) <= (len(self._blocks) - 1) * PAGES_PER_BLOCK:
            self._pool.release([self._blocks.pop()])
