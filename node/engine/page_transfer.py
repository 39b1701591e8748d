"""Pages out of this engine and into it, as bytes: what a peer has computed need not be computed again.

A page may come in only where it would be what is computed here: of a span whose kernels are exact, under the same numerics, in
the same layout (which the stage showed when it was loaded), and of finite numbers. Its name says of which tokens and whose.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from mesh.errors import LocalError
from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.view import Span, is_exact
from node.engine.api import OpenSequence, PageRequest, PagesMissing
from node.engine.faults import all_finite
from node.engine.kv.page_bytes import PageLayout, from_bytes, layout_of, to_bytes
from node.engine.kv.page_store import PageLost, PageStore
from node.engine.kv.prefix_index import PageName
from node.engine.model.stage import Stage
from node.engine.scheduling.scheduler import Scheduler
from node.engine.selfcheck import SelfcheckInput, run_together


def shown_layout(stage: Stage) -> PageLayout:
    """How the stage keeps a page, seen at one token that it computes."""
    probe = SelfcheckInput(stage, 1, 1)
    run_together(stage, [(probe, 1)])
    shown = layout_of(probe.kv.page(0, 1, range(stage.start, stage.end)))
    return PageLayout(shown.dtype, tuple((layer, (*shape[:2], PREFIX_PAGE_TOKENS, *shape[3:])) for layer, shape in shown.shapes))


class PageTransfer:
    """`lock`: the engine's, which guards all the rest."""

    def __init__(self, lock: threading.Condition, scheduler: Scheduler, kept: Mapping[Span, PageStore]) -> None:
        self._lock = lock
        self._scheduler = scheduler
        self._kept = kept
        self._spans: dict[Span, tuple[PageLayout, str]] = {}  # that take part, with their numerics

    def add(self, span: Span, layout: PageLayout, numerics: str) -> None:
        """The caller holds the lock, as for `drop`."""
        if is_exact(numerics):
            self._spans[span] = layout, numerics

    def drop(self, span: Span) -> None:
        self._spans.pop(span, None)

    def wanted(self, sequence: OpenSequence) -> PagesMissing | None:
        with self._lock:
            span, names = self._pages_of(sequence)
            if span is None or not names:
                return None
            layout = self._spans[span][0].part(sequence.start, sequence.end)
            kept = len(self._scheduler.find_pages(span, names))
        prefixes = tuple(name.prefix for name in names)
        ask = PageRequest(sequence.model, sequence.start, sequence.end, names[0].numerics, layout.name, prefixes)
        return PagesMissing(kept, len(names), layout.size_bytes, ask)

    def export_pages(self, ask: PageRequest, most_bytes: int) -> list[bytes]:
        names = [PageName(ask.start, ask.end, ask.numerics, prefix) for prefix in ask.names]
        with self._lock:
            found = [
                (self._kept[span], self._scheduler.find_pages(span, names), layout.part(ask.start, ask.end))
                for span, (layout, numerics) in self._spans.items()
                if span.model == ask.model and span.start <= ask.start < ask.end <= span.end and numerics == ask.numerics
            ]
        for kept, numbers, layout in found:
            if numbers and layout.name == ask.layout:
                return _contents(kept, numbers[: max(1, most_bytes // layout.size_bytes)], layout)
        return []

    def import_pages(self, sequence: OpenSequence, first: int, contents: list[bytes]) -> int:
        with self._lock:
            span, names = self._pages_of(sequence)
            layout = self._spans[span][0].part(sequence.start, sequence.end) if span is not None else None
        if span is None or layout is None:
            return 0  # unloaded meanwhile
        pages = [from_bytes(content, layout) for content in contents]
        if not all(all_finite(kv) for page in pages for kv in page.values()):
            raise ValueError("a page holds what is no number")
        taken = 0
        with self._lock:
            kept = self._kept.get(span)
            for name, page in zip(names[first:], pages, strict=False):
                number = self._scheduler.add_page(span, name) if kept is not None else None
                if number is None and not self._scheduler.find_pages(span, [name]):
                    break  # no room
                if kept is not None and number is not None:
                    kept.store(number, page)
                taken += 1
        return taken

    def _pages_of(self, sequence: OpenSequence) -> tuple[Span | None, list[PageName]]:
        """Of all whole pages that it could begin behind, where it may."""
        prefix = sequence.prefix
        try:
            span = self._scheduler.span_for(sequence)
        except LocalError:
            return None, []
        if prefix is None or span not in self._spans or self._spans[span][1] != prefix.numerics:
            return None, []
        whole = prefix.names[: (sequence.known - 1) // PREFIX_PAGE_TOKENS]
        return span, [PageName(sequence.start, sequence.end, prefix.numerics, name) for name in whole]


def _contents(kept: PageStore, numbers: list[int], layout: PageLayout) -> list[bytes]:
    """Of the pages up to the first that went meanwhile."""
    contents = []
    for number in numbers:
        try:
            [page] = kept.get([number])
        except PageLost:
            break
        if layout_of(page) != layout:
            break
        contents.append(to_bytes(page))
    return contents
