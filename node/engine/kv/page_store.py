"""Holds the content of the pages of one span: resident pages as tensors, spilled pages as bytes. The index decides which.

The bytes of a page are the keys and values of its layers one after another, raw, in the element type of the kernel.
They carry no header: the reader has the layout, and refuses bytes of any other length before a tensor is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b

import torch

from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.view import Span
from node.engine.api import SequenceKey
from node.engine.faults import all_finite, is_out_of_memory
from node.engine.kv.cache import Page, SequenceKV
from node.engine.kv.prefix_index import PageCopy
from node.engine.kv.spill import Spill, SpilledContentLost


@dataclass(frozen=True, slots=True)
class PageLayout:
    """`shapes`: for each layer that stores something, `[2, kv_heads, positions, dim]`."""

    dtype: torch.dtype
    shapes: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def size_bytes(self) -> int:
        return sum(torch.Size(shape).numel() for _, shape in self.shapes) * self.dtype.itemsize

    @property
    def name(self) -> bytes:
        """A digest that is equal for equal layouts, 16 bytes."""
        return blake2b(repr((str(self.dtype), self.shapes)).encode(), digest_size=16).digest()

    def part(self, start: int, end: int) -> PageLayout:
        """Returns the layout of the layers `[start, end)` alone."""
        return PageLayout(self.dtype, tuple((layer, shape) for layer, shape in self.shapes if start <= layer < end))


def layout_of(page: Page) -> PageLayout:
    first = next(iter(page.values()))
    return PageLayout(first.dtype, tuple((layer, tuple(kv.shape)) for layer, kv in page.items()))


def to_bytes(page: Page) -> bytes:
    return b"".join(kv.cpu().contiguous().view(torch.uint8).numpy().tobytes() for kv in page.values())


def from_bytes(content: bytes, layout: PageLayout) -> Page:
    """Returns the page that `to_bytes` turned into `content`.

    Raises:
        ValueError: the content has another length than a page of this layout.
    """
    if len(content) != layout.size_bytes:
        raise ValueError(f"expected a page of {layout.size_bytes} bytes, got {len(content)}")
    flat = torch.frombuffer(bytearray(content), dtype=layout.dtype)
    page, offset = {}, 0
    for layer, shape in layout.shapes:
        count = torch.Size(shape).numel()
        page[layer] = flat[offset : offset + count].view(shape)
        offset += count
    assert offset == len(flat)
    return page


class PageLost(Exception):
    """The content of pages that are in the index cannot be read."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__(f"pages {', '.join(map(str, numbers))} are lost")
        self.numbers = tuple(numbers)


class PageStore:
    """Pages by number. Only the engine thread spills and drops pages; any thread may `get`, or `store` under a new number."""

    def __init__(self, span: Span, spill: Spill, held_by_workers: bool = False) -> None:
        """`held_by_workers`: worker processes hold the content of pages; this store has handles without content."""
        self.held_by_workers = held_by_workers
        self._resident: dict[int, Page] = {}
        self._spilled: dict[int, PageLayout] = {}
        self._spill = spill
        self._name_prefix = f"{span.model}:{span.start}:{span.end}:{id(self)}:".encode()

    def __len__(self) -> int:
        """The number of resident pages."""
        return len(self._resident)

    def store(self, number: int, page: Page) -> bool:
        """Stores a page; False: the page holds a number that is not finite, so no sequence could use it."""
        if not self.held_by_workers and not all(map(all_finite, page.values())):
            return False
        self._resident[number] = page
        return True

    def store_copies(self, copies: Iterable[PageCopy], sequences: Mapping[SequenceKey, SequenceKV]) -> list[PageCopy]:
        """Copies pages out of sequences; returns the copies not stored, for lack of memory or numbers that are not finite."""
        return [copy for copy in copies if not self._store_copy(copy, sequences[copy.key])]

    def _store_copy(self, copy: PageCopy, kv: SequenceKV) -> bool:
        try:
            page = kv.page(copy.position, PREFIX_PAGE_TOKENS, range(copy.lane.start, copy.lane.end))
            return self.store(copy.number, page)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False

    def get(self, numbers: Sequence[int]) -> list[Page]:
        """Returns the pages. Raises PageLost, with all pages that cannot be read."""
        pages = [self._get(number) for number in numbers]
        lost = [number for number, page in zip(numbers, pages, strict=True) if page is None]
        if lost:
            raise PageLost(lost)
        return [page for page in pages if page is not None]

    def _get(self, number: int) -> Page | None:
        page, layout = self._resident.get(number), self._spilled.get(number)
        if page is None and layout is not None:
            with suppress(SpilledContentLost):
                page = from_bytes(self._spill.get(self._name(number)), layout)
        return page

    def spill(self, number: int) -> bool:
        """Moves a page out of the engine's memory; False: the page is lost, as always where worker processes hold its content."""
        page = self._resident.pop(number, None)
        if not isinstance(page, dict) or not page or not self._spill.put(self._name(number), to_bytes(page)):
            return False
        self._spilled[number] = layout_of(page)
        return True

    def drop(self, number: int) -> None:
        self._resident.pop(number, None)
        if self._spilled.pop(number, None) is not None:
            self._spill.drop(self._name(number))

    def close(self) -> None:
        """Drops what this store spilled; the span is unloaded."""
        for number in list(self._spilled):
            self._spill.drop(self._name(number))

    def _name(self, number: int) -> bytes:
        return self._name_prefix + str(number).encode()
