"""What the pages of one span hold: those within the engine's memory as tensors, those spilled as bytes. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.view import Span
from node.engine.api import SequenceKey
from node.engine.faults import all_finite, is_out_of_memory
from node.engine.kv.cache import Page, SequenceKV
from node.engine.kv.page_bytes import PageLayout, from_bytes, layout_of, to_bytes
from node.engine.kv.prefix_index import PageCopy
from node.engine.kv.spill import Damaged, Spill


class PageLost(Exception):
    """Pages that the index counts on cannot be had any more."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__(f"pages {', '.join(map(str, numbers))} are lost")
        self.numbers = tuple(numbers)


class PageStore:
    """Pages by number. The engine thread alone moves and drops them; any thread may `get`, or `store` a number that is new."""

    def __init__(self, span: Span, spill: Spill, elsewhere: bool = False) -> None:
        """`elsewhere`: worker processes keep what pages hold; here are only their numbers."""
        self.elsewhere = elsewhere
        self._at_hand: dict[int, Page] = {}
        self._spilled: dict[int, PageLayout] = {}
        self._spill = spill
        self._prefix = f"{span.model}:{span.start}:{span.end}:{id(self)}:".encode()

    def __len__(self) -> int:
        """Pages within the engine's memory."""
        return len(self._at_hand)

    def store(self, number: int, page: Page) -> bool:
        """False: the page holds what is no finite number, and is not kept: it is of no use to any sequence."""
        if not self.elsewhere and not all(map(all_finite, page.values())):
            return False
        self._at_hand[number] = page
        return True

    def store_all(self, stores: Iterable[PageCopy], sequences: Mapping[SequenceKey, SequenceKV]) -> list[PageCopy]:
        """Copies pages out of sequences; those that were not kept, for want of memory or as `store` says."""
        return [each for each in stores if not self._copied(each, sequences[each.key])]

    def _copied(self, store: PageCopy, kv: SequenceKV) -> bool:
        try:
            return self.store(store.number, kv.page(store.position, PREFIX_PAGE_TOKENS, range(store.lane.start, store.lane.end)))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False

    def get(self, numbers: Sequence[int]) -> list[Page]:
        """Raises PageLost, with all of them that are."""
        pages = [self._get(number) for number in numbers]
        if None in pages:
            raise PageLost([number for number, page in zip(numbers, pages, strict=True) if page is None])
        return [page for page in pages if page is not None]

    def _get(self, number: int) -> Page | None:
        page, layout = self._at_hand.get(number), self._spilled.get(number)
        if page is None and layout is not None:
            with suppress(Damaged):
                page = from_bytes(self._spill.get(self._name(number)), layout)
        return page

    def spill(self, number: int) -> bool:
        """Out of the engine's memory; False: its content is gone, as it is where worker processes keep it."""
        page = self._at_hand.pop(number, None)
        if not isinstance(page, dict) or not page or not self._spill.put(self._name(number), to_bytes(page)):
            return False
        self._spilled[number] = layout_of(page)
        return True

    def drop(self, number: int) -> None:
        self._at_hand.pop(number, None)
        if self._spilled.pop(number, None) is not None:
            self._spill.drop(self._name(number))

    def close(self) -> None:
        """The span is unloaded: what it spilled goes."""
        for number in list(self._spilled):
            self._spill.drop(self._name(number))

    def _name(self, number: int) -> bytes:
        return self._prefix + str(number).encode()
