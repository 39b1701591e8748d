"""Exports pages from this engine and imports them, as bytes, so that a peer need not compute them again.

A page is imported only if it is equal to what this engine would compute: for a span whose kernels are exact, under the same
numerics, in the same layout (found when the stage was loaded), and with finite numbers. Its name binds it to its tokens and to
the tenant.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from mesh.errors import LocalError
from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.view import Span, is_exact
from node.engine.api import OpenSequence, PageRequest, PagesMissing
from node.engine.faults import all_finite
from node.engine.kv.page_store import PageLayout, PageLost, PageStore, from_bytes, layout_of, to_bytes
from node.engine.kv.prefix_index import PageName
from node.engine.model.stage import Stage
from node.engine.scheduling.kv_allocator import KvAllocator
from node.engine.selfcheck import SelfcheckInput, run_batch


def page_layout(stage: Stage) -> PageLayout:
    """Returns the layout of the stage's pages, from the keys and values of one token that it computes."""
    probe = SelfcheckInput(stage, 1, 1)
    run_batch(stage, [(probe, 1)])
    one_token = layout_of(probe.kv.page(0, 1, range(stage.start, stage.end)))
    shapes = tuple((layer, (*shape[:2], PREFIX_PAGE_TOKENS, *shape[3:])) for layer, shape in one_token.shapes)
    return PageLayout(one_token.dtype, shapes)


class PageTransfer:
    """Implements `PageAccess`. `lock`: the lock of the engine, which guards all other arguments and fields."""

    def __init__(self, lock: threading.Condition, allocator: KvAllocator, stores: Mapping[Span, PageStore]) -> None:
        self._lock = lock
        self._allocator = allocator
        self._stores = stores
        self._spans: dict[Span, tuple[PageLayout, str]] = {}  # that take part -> (layout, numerics)

    def add(self, span: Span, layout: PageLayout, numerics: str) -> None:
        """Lets a span take part if its kernels are exact. The caller holds the lock, as for `drop`."""
        if is_exact(numerics):
            self._spans[span] = layout, numerics

    def drop(self, span: Span) -> None:
        self._spans.pop(span, None)

    def missing_pages(self, sequence: OpenSequence) -> PagesMissing | None:
        with self._lock:
            span, names = self._usable_pages(sequence)
            if span is None or not names:
                return None
            layout = self._spans[span][0].part(sequence.start, sequence.end)
            kept = len(self._allocator.find_pages(span, names))
        prefixes = tuple(name.prefix for name in names)
        request = PageRequest(sequence.model, sequence.start, sequence.end, names[0].numerics, layout.name, prefixes)
        return PagesMissing(kept, len(names), layout.size_bytes, request)

    def export_pages(self, request: PageRequest, max_bytes: int) -> list[bytes]:
        names = [PageName(request.start, request.end, request.numerics, prefix) for prefix in request.names]
        with self._lock:
            found = [
                (self._stores[span], self._allocator.find_pages(span, names), layout.part(request.start, request.end))
                for span, (layout, numerics) in self._spans.items()
                if span.model == request.model
                and span.start <= request.start < request.end <= span.end
                and numerics == request.numerics
            ]
        # Contents are read without the lock: pages never change, and one that is dropped meanwhile ends the answer.
        for store, numbers, layout in found:
            if numbers and layout.name == request.layout:
                return _contents(store, numbers[: max(1, max_bytes // layout.size_bytes)], layout)
        return []

    def import_pages(self, sequence: OpenSequence, first: int, contents: list[bytes]) -> int:
        with self._lock:
            span, names = self._usable_pages(sequence)
            layout = self._spans[span][0].part(sequence.start, sequence.end) if span is not None else None
        if span is None or layout is None:
            return 0  # the span was unloaded since the pages were requested
        pages = [from_bytes(content, layout) for content in contents]
        if not all(all_finite(kv) for page in pages for kv in page.values()):
            raise ValueError("a page holds numbers that are not finite")
        imported = 0
        with self._lock:
            store = self._stores.get(span)
            # There may be more contents than names, if the peer sent more than was requested: the rest is ignored.
            for name, page in zip(names[first:], pages, strict=False):
                number = self._allocator.add_page(span, name) if store is not None else None
                if number is None and not self._allocator.find_pages(span, [name]):
                    break  # no room
                if store is not None and number is not None:
                    stored = store.store(number, page)
                    assert stored  # the numbers were checked above
                imported += 1
        return imported

    def _usable_pages(self, sequence: OpenSequence) -> tuple[Span | None, list[PageName]]:
        """Returns the span and the names of all whole pages behind which a sequence could start; none if not exchanged."""
        prefix = sequence.prefix
        try:
            span = self._allocator.span_for(sequence)
        except LocalError:
            return None, []
        if prefix is None or span not in self._spans or self._spans[span][1] != prefix.numerics:
            return None, []
        whole = prefix.names[: (sequence.known - 1) // PREFIX_PAGE_TOKENS]
        return span, [PageName(sequence.start, sequence.end, prefix.numerics, name) for name in whole]


def _contents(store: PageStore, numbers: list[int], layout: PageLayout) -> list[bytes]:
    """Returns the contents of pages, up to the first that is gone."""
    contents = []
    for number in numbers:
        try:
            [page] = store.get([number])
        except PageLost:
            break
        if layout_of(page) != layout:
            break
        contents.append(to_bytes(page))
    return contents
