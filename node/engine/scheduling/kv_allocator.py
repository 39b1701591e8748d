"""The memory of the loaded spans: blocks and pages that sequences hold, get and give back. Counting only, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mesh.errors import LocalError
from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.view import Span
from node.engine.api import OpenSequence
from node.engine.kv.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from node.engine.kv.prefix_index import PageCopy, PageIndex, PageName
from node.engine.scheduling.sequence import StageSequence
from node.engine.scheduling.step_plan import HeldSpan, ScheduledChunk


class KvAllocator:
    def __init__(self) -> None:
        self.spans: dict[Span, HeldSpan] = {}
        self._pages: dict[Span, PageIndex] = {}
        self._stores: list[PageCopy] = []
        self._held_by_step: list[tuple[BlockPool, list[int]]] = []

    # ---- spans

    def add(self, span: Span, held: HeldSpan) -> None:
        if span not in self.spans:
            self.spans[span] = held
            self._pages[span] = PageIndex(held.pool)

    def drop(self, span: Span) -> None:
        self.spans.pop(span, None)
        self._pages.pop(span, None)

    def fit(self, spill_rooms: Mapping[Span, int]) -> None:
        """The pools have other sizes now, and so many pages of each span may be spilled."""
        for span, pages in self._pages.items():
            pages.fit(spill_rooms.get(span, 0))

    def span_for(self, request: OpenSequence) -> Span:
        """The span with most room that holds the layers asked for. Raises LocalError: there is none."""
        fitting = [
            span
            for span, held in self.spans.items()
            if span.model == request.model
            and span.start <= request.start < request.end <= span.end
            and request.weights in ("", held.weights)
        ]
        if not fitting:
            of = f"{request.model} with weights {request.weights[:16]}" if request.weights else request.model
            raise LocalError(f"no loaded span holds layers {request.start}:{request.end} of {of}")
        return max(fitting, key=lambda span: (self.free(span), -span.start, -span.end))

    def free(self, span: Span) -> int:
        """Blocks that no sequence holds."""
        return self.spans[span].pool.free + self._pages[span].blocks

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return sum(held.pool.used for held in self.spans.values()) - sum(pages.blocks for pages in self._pages.values())

    @property
    def total(self) -> int:
        return sum(held.pool.total for held in self.spans.values())

    @property
    def pages(self) -> int:
        return sum(map(len, self._pages.values()))

    @property
    def spilled_pages(self) -> int:
        return sum(pages.spilled for pages in self._pages.values())

    # ---- a sequence's memory

    def give(self, sequence: StageSequence) -> bool:
        """Blocks for the tokens known so far, and the pages that hold their beginning; False: there is no room."""
        pages, prefix = self._pages[sequence.lane.span], sequence.opened.prefix
        names = [sequence.page_name(page) for page in range(min(len(sequence.names), (sequence.known - 1) // PREFIX_PAGE_TOKENS))]
        pages.find(names)  # those it wants are now the last to go
        blocks = pages.take(blocks_for(sequence.known + 1))
        if blocks is None:
            return False
        sequence.blocks = blocks
        found = pages.find(names)
        if sequence.first and prefix is not None and prefix.elsewhere is not None:
            found = found[: prefix.elsewhere]
        pages.pin(found)
        sequence.offered = found
        if sequence.first:
            self.begin(sequence, len(found) * PREFIX_PAGE_TOKENS)
        return True

    def begin(self, sequence: StageSequence, position: int) -> None:
        """It computes from `position` on, and takes what is before from the pages it was offered."""
        count = position // PREFIX_PAGE_TOKENS
        self._pages[sequence.lane.span].unpin(sequence.offered[count:])
        sequence.restoring, sequence.offered = sequence.offered[:count], []
        sequence.computed = sequence.pushed_end = position
        sequence.pages_kept = count

    def may_give(self, sequence: StageSequence) -> bool:
        """Whether `give` is worth trying."""
        return blocks_for(sequence.known + 1) <= self.free(sequence.lane.span)

    def grow(self, sequence: StageSequence, tokens: int) -> bool:
        """More blocks, so that `tokens` fit; False: there are none."""
        missing = blocks_for(min(tokens, sequence.limit)) - len(sequence.blocks)
        more = self._pages[sequence.lane.span].take(missing) if missing > 0 else []
        if more is None:
            return False
        sequence.blocks += more
        return True

    @staticmethod
    def spare(sequence: StageSequence) -> int:
        """Guesses that fit into the blocks it has: none is worth another's block."""
        return len(sequence.blocks) * BLOCK_TOKENS - sequence.known - 1

    def give_up(self, sequence: StageSequence) -> None:
        self._pages[sequence.lane.span].unpin([*sequence.offered, *sequence.restoring])
        self.spans[sequence.lane.span].pool.release(sequence.blocks)
        sequence.blocks, sequence.offered, sequence.restoring = [], [], []

    # ---- a step's memory

    def hold(self, chunk: ScheduledChunk) -> None:
        """The step computes on these blocks until `end_step`, whatever becomes of the sequence."""
        pool = self.spans[chunk.sequence.lane.span].pool
        pool.retain(chunk.sequence.blocks)
        self._held_by_step.append((pool, list(chunk.sequence.blocks)))

    def end_step(self) -> None:
        for pool, blocks in self._held_by_step:
            pool.release(blocks)
        self._held_by_step = []

    def keep_pages(self, sequence: StageSequence) -> None:
        """The sequence's first chunk has read what it restores; has the pages kept that have become whole, if there is room."""
        pages = self._pages[sequence.lane.span]
        pages.unpin(sequence.restoring)
        sequence.restoring = []
        sequence.learn_names()
        before = sequence.pages_kept
        while sequence.pages_kept < min(len(sequence.names), sequence.settled // PREFIX_PAGE_TOKENS):
            name = sequence.page_name(sequence.pages_kept)
            number = pages.add(name)
            if number is not None:
                self._stores.append(PageCopy(sequence.key, sequence.lane, sequence.pages_kept * PREFIX_PAGE_TOKENS, number))
            elif name not in pages:
                break
            sequence.pages_kept += 1
        if sequence.pages_kept > before:
            pages.find([sequence.page_name(page) for page in range(sequence.pages_kept)])  # its beginning is the last to go

    def pages_to_store(self) -> list[PageCopy]:
        """What is to be copied before the next plan."""
        stores, self._stores = self._stores, []
        return stores

    def find_pages(self, span: Span, names: Sequence[PageName]) -> list[int]:
        return self._pages[span].find(names) if span in self._pages else []

    def add_page(self, span: Span, name: PageName) -> int | None:
        return self._pages[span].add(name) if span in self._pages else None

    def drop_page(self, span: Span, number: int) -> None:
        if span in self._pages:
            self._pages[span].drop(number)

    def spilling_pages(self) -> tuple[tuple[Span, int], ...]:
        return tuple((span, number) for span, pages in self._pages.items() for number in pages.spilling())

    def dropped_pages(self) -> tuple[tuple[Span, int], ...]:
        return tuple((span, number) for span, pages in self._pages.items() for number in pages.dropped())
