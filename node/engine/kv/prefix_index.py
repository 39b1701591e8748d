"""Which keys and values of earlier sequences are kept for later ones, and which of them go first. Counting only, no torch.

A page holds the keys and values of `PREFIX_PAGE_TOKENS` whole tokens in the layers `[start, end)`, under the name of the tokens
up to its end (`mesh.prefix`). Whatever memory no sequence needs keeps pages; a sequence that wants a block takes it from
the page that was wanted longest ago. What is about to be read is pinned until it was. A page that has to go is *spilled*
where there is room for that (`spill`): it is found as before and holds no block; of those the one spilled or wanted longest
ago is the first to go for good.

A page is copied into a sequence, not shared with it: attention on a CPU wants a sequence's keys in one piece, and copying
a token costs a thousandth of computing it. So pages never change, and a writer never meets a reader.
Exactness: the bits of a page depend on its tokens alone, by the rules of `attention` and `linear`, as long as one kind of
kernels computed all of them; hence the numerics in the name. Pages are numbered, and numbers never return.
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
    """All that the bits of a page depend on."""

    start: int
    end: int
    numerics: str  # the fingerprint of every stage that computed it, for activations carry their kernels' roundings
    prefix: bytes


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Keep the keys and values at positions `position … position + PREFIX_PAGE_TOKENS - 1` of a sequence as page `number`."""

    key: SequenceKey
    lane: Lane
    position: int
    number: int


@dataclass(slots=True)
class _Page:
    number: int
    readers: int = 0


class PageIndex:
    """The pages of one span, and the blocks they take from its pool: one for every `PAGES_PER_BLOCK`, or part of it.

    `spill_room`: how many pages may be spilled.
    """

    def __init__(self, pool: BlockPool, first_number: int = 0, spill_room: int = 0) -> None:
        self._pool = pool
        self._pages: OrderedDict[PageName, _Page] = OrderedDict()  # what was wanted longest ago comes first
        self._away: OrderedDict[PageName, _Page] = OrderedDict()  # spilled; the first to go comes first
        self._spill_room = spill_room
        self._spilling: list[int] = []
        self._names: dict[int, PageName] = {}
        self._blocks: list[int] = []
        self._dropped: list[int] = []
        self._next_number = first_number

    def __len__(self) -> int:
        return len(self._pages) + len(self._away)

    @property
    def spilled(self) -> int:
        return len(self._away)

    @property
    def blocks(self) -> int:
        """Blocks that hold pages which are not spilled; those without readers are as good as free."""
        return len(self._blocks)

    @property
    def readers(self) -> int:
        return sum(page.readers for page in [*self._pages.values(), *self._away.values()])

    def find(self, names: Sequence[PageName]) -> list[int]:
        """The numbers of the longest run of kept pages that begins with the first name.

        The first pages of a run are remembered longest: those behind them are of no use without them.
        """
        found = []
        for name in names:
            if name not in self:
                break
            found.append(self._page(name).number)
        for name in reversed(names[: len(found)]):
            (self._pages if name in self._pages else self._away).move_to_end(name)
        return found

    def pin(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._page(self._names[number]).readers += 1

    def unpin(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._page(self._names[number]).readers -= 1

    def _page(self, name: PageName) -> _Page:
        return self._pages.get(name) or self._away[name]

    def add(self, name: PageName) -> int | None:
        """The number of a new page, whose content the caller must store before any plan that was made later runs.

        None: it is kept already, or there is no room.
        """
        if name in self:
            return None
        if len(self._pages) == len(self._blocks) * PAGES_PER_BLOCK:
            block = self._pool.take(1)
            if block is not None:
                self._blocks += block
            elif not self._drop_oldest():
                return None
        number = self._next_number
        self._next_number += 1
        self._pages[name] = _Page(number)
        self._names[number] = name
        return number

    def __contains__(self, name: PageName) -> bool:
        return name in self._pages or name in self._away

    def drop(self, number: int) -> None:
        """A page without readers whose content could not be stored, or is lost; unknown numbers are fine."""
        name = self._names.pop(number, None)
        if name is not None:
            self._away.pop(name, None) or self._pages.pop(name)
            self._dropped.append(number)
            self._give_back()

    def take(self, count: int) -> list[int] | None:
        """Blocks for a sequence, at the expense of unpinned pages; None (then no page is dropped) when that is not enough."""
        missing = count - self._pool.free
        if missing > 0 and not self._free_blocks(missing + max(0, self._pool.used - self._pool.total)):
            return None
        return self._pool.take(count)

    def fit(self, spill_room: int | None = None) -> None:
        """Gives blocks back while the pool, which was made smaller, is over its size; `spill_room`: None: as before."""
        self._spill_room = self._spill_room if spill_room is None else spill_room
        while len(self._away) > self._spill_room and self._drop_spilled():
            pass
        while self._pool.used > self._pool.total and self._drop_oldest():
            self._give_back()

    def dropped(self) -> tuple[int, ...]:
        """Pages gone since the last call: their content can go."""
        gone, self._dropped = tuple(self._dropped), []
        return gone

    def spilling(self) -> tuple[int, ...]:
        """Pages spilled since the last call: their content must be before any plan that was made later runs."""
        going, self._spilling = tuple(self._spilling), []
        return going

    def _free_blocks(self, count: int) -> bool:
        unread = sum(page.readers == 0 for page in self._pages.values())
        room = len(self._blocks) - -(-(len(self._pages) - unread) // PAGES_PER_BLOCK)
        if room < count:
            return False
        keep = len(self._blocks) - count
        while len(self._blocks) > keep:
            self._drop_oldest()
            self._give_back()
        return True

    def _drop_oldest(self) -> bool:
        for name, page in self._pages.items():
            if page.readers == 0:
                del self._pages[name]
                if len(self._away) < self._spill_room or (self._spill_room and self._drop_spilled()):
                    self._away[name] = page
                    self._spilling.append(page.number)
                else:
                    del self._names[page.number]
                    self._dropped.append(page.number)
                return True
        return False

    def _drop_spilled(self) -> bool:
        for name, page in self._away.items():
            if page.readers == 0:
                del self._away[name], self._names[page.number]
                self._dropped.append(page.number)
                return True
        return False

    def _give_back(self) -> None:
        while len(self._pages) <= (len(self._blocks) - 1) * PAGES_PER_BLOCK:
            self._pool.release([self._blocks.pop()])
