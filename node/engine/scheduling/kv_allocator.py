"""Accounts for the KV memory of the loaded spans: which sequence holds which blocks, and which pages it reads. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mesh.errors import LocalError
from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.view import Span
from node.engine.api import OpenSequence
from node.engine.kv.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from node.engine.kv.prefix_index import PageCopy, PageIndex, PageName
from node.engine.scheduling.sequence import ScheduledChunk, StageSequence


@dataclass(frozen=True, slots=True, eq=False)
class HeldSpan:
    """The properties of a loaded span that scheduling depends on."""

    pool: BlockPool
    layers: int  # of the whole model
    hidden_size: int
    vocab_size: int
    max_model_len: int
    end_ids: frozenset[int]  # the model's own end-of-sequence tokens
    whole_only: bool = False  # the model cannot be served in parts
    exact: bool = True  # the kernels compute the same bits however rows are batched; guesses are allowed only then
    weights: str = ""  # their identity (`mesh.manifest`)


class KvAllocator:
    """The blocks and pages of all loaded spans."""

    def __init__(self) -> None:
        self.spans: dict[Span, HeldSpan] = {}
        self._indexes: dict[Span, PageIndex] = {}
        self._copies: list[PageCopy] = []
        self._held_by_step: list[tuple[BlockPool, list[int]]] = []

    # ---- spans

    def add_span(self, span: Span, held: HeldSpan) -> None:
        if span not in self.spans:
            self.spans[span] = held
            self._indexes[span] = PageIndex(held.pool)

    def drop_span(self, span: Span) -> None:
        self.spans.pop(span, None)
        self._indexes.pop(span, None)

    def apply_limits(self, max_spilled_pages: Mapping[Span, int]) -> None:
        """Drops and spills pages until each span fits the new size of its pool and its limit of spilled pages."""
        for span, index in self._indexes.items():
            index.apply_limits(max_spilled_pages.get(span, 0))

    def span_for(self, request: OpenSequence) -> Span:
        """Returns the loaded span that holds the requested layers and has the most free blocks.

        Raises:
            LocalError: no loaded span holds these layers of these weights.
        """
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
        return max(fitting, key=lambda span: (self.free_blocks(span), -span.start, -span.end))

    def free_blocks(self, span: Span) -> int:
        """Returns the blocks of a span that no sequence holds; pages give their blocks up on demand."""
        return self.spans[span].pool.free + self._indexes[span].blocks

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold, on all spans."""
        in_use = sum(held.pool.used for held in self.spans.values())
        return in_use - sum(index.blocks for index in self._indexes.values())

    @property
    def total_blocks(self) -> int:
        return sum(held.pool.total for held in self.spans.values())

    @property
    def pages(self) -> int:
        return sum(map(len, self._indexes.values()))

    @property
    def spilled_pages(self) -> int:
        return sum(index.spilled for index in self._indexes.values())

    # ---- the memory of a sequence

    def allocate(self, sequence: StageSequence) -> bool:
        """Allocates blocks for the known tokens and pins the pages that hold the first of them; False: too few blocks."""
        assert not sequence.blocks and not sequence.offered_pages and not sequence.restoring_pages
        index, prefix = self._indexes[sequence.lane.span], sequence.request.prefix
        # The last known token is always computed, for its logits: a page that ends with it is of no use.
        usable = min(len(sequence.page_names), (sequence.known - 1) // PREFIX_PAGE_TOKENS)
        names = [sequence.page_name(page) for page in range(usable)]
        index.find(names)  # makes these pages the last to be evicted for the blocks taken next
        blocks = index.take(blocks_for(sequence.known + 1))
        if blocks is None:
            return False
        sequence.blocks = blocks
        found = index.find(names)  # once more: taking blocks may have evicted some
        if sequence.on_first_stage and prefix is not None and prefix.elsewhere is not None:
            found = found[: prefix.elsewhere]  # the later stages hold no more than these
        index.pin(found)
        sequence.offered_pages = found
        # The first stage starts now. A later stage starts where the first activations that it receives begin.
        if sequence.on_first_stage:
            self.start_at(sequence, len(found) * PREFIX_PAGE_TOKENS)
        return True

    def start_at(self, sequence: StageSequence, position: int) -> None:
        """Starts the computation at `position`; the positions before it are restored from the offered pages."""
        count = position // PREFIX_PAGE_TOKENS
        assert position % PREFIX_PAGE_TOKENS == 0 and count <= len(sequence.offered_pages)
        self._indexes[sequence.lane.span].unpin(sequence.offered_pages[count:])
        sequence.restoring_pages, sequence.offered_pages = sequence.offered_pages[:count], []
        sequence.computed = sequence.pushed_end = position
        sequence.pages_kept = count

    def may_allocate(self, sequence: StageSequence) -> bool:
        """Returns whether `allocate` may succeed; it still fails where pinned pages hold the blocks."""
        return blocks_for(sequence.known + 1) <= self.free_blocks(sequence.lane.span)

    def grow(self, sequence: StageSequence, tokens: int) -> bool:
        """Allocates more blocks so that `tokens` fit; False: no block is free."""
        assert sequence.blocks
        missing = blocks_for(min(tokens, sequence.end_position)) - len(sequence.blocks)
        more = self._indexes[sequence.lane.span].take(missing) if missing > 0 else []
        if more is None:
            return False
        sequence.blocks += more
        return True

    @staticmethod
    def spare_tokens(sequence: StageSequence) -> int:
        """Returns how many guesses fit into the blocks of a sequence: no sequence is evicted for the guesses of another."""
        return len(sequence.blocks) * BLOCK_TOKENS - sequence.known - 1

    def release(self, sequence: StageSequence) -> None:
        self._indexes[sequence.lane.span].unpin([*sequence.offered_pages, *sequence.restoring_pages])
        self.spans[sequence.lane.span].pool.release(sequence.blocks)
        sequence.blocks, sequence.offered_pages, sequence.restoring_pages = [], [], []

    # ---- the memory of a step

    def hold_for_step(self, chunk: ScheduledChunk) -> None:
        """Keeps the blocks of a chunk's sequence allocated until `release_step`, even if the sequence is closed before."""
        pool, blocks = self.spans[chunk.sequence.lane.span].pool, chunk.sequence.blocks
        assert len(blocks) * BLOCK_TOKENS >= chunk.position + chunk.count
        pool.retain(blocks)
        self._held_by_step.append((pool, list(blocks)))

    def release_step(self) -> None:
        for pool, blocks in self._held_by_step:
            pool.release(blocks)
        self._held_by_step = []

    def keep_pages(self, sequence: StageSequence) -> None:
        """Adds the sequence's pages that have become whole to the index, as far as there is room; called after each chunk."""
        index = self._indexes[sequence.lane.span]
        index.unpin(sequence.restoring_pages)  # the first chunk has read them
        sequence.restoring_pages = []
        sequence.update_page_names()
        before = sequence.pages_kept
        while sequence.pages_kept < min(len(sequence.page_names), sequence.final_positions // PREFIX_PAGE_TOKENS):
            name = sequence.page_name(sequence.pages_kept)
            number = index.add(name)
            if number is not None:
                position = sequence.pages_kept * PREFIX_PAGE_TOKENS
                self._copies.append(PageCopy(sequence.key, sequence.lane, position, number))
            elif name not in index:
                break  # no room: the pages behind this one would be of no use without it
            sequence.pages_kept += 1
        if sequence.pages_kept > before:
            # The first pages of a sequence are to be evicted after those behind them.
            index.find([sequence.page_name(page) for page in range(sequence.pages_kept)])

    def take_page_copies(self) -> list[PageCopy]:
        """Returns the copies due since the last call; the worker makes them before the next plan."""
        copies, self._copies = self._copies, []
        return copies

    # ---- pages

    def find_pages(self, span: Span, names: Sequence[PageName]) -> list[int]:
        """Returns the numbers of the kept pages, up to the first that is not kept."""
        return self._indexes[span].find(names) if span in self._indexes else []

    def add_page(self, span: Span, name: PageName) -> int | None:
        """As `PageIndex.add`; the caller holds the lock until the content of the page is stored."""
        return self._indexes[span].add(name) if span in self._indexes else None

    def drop_page(self, span: Span, number: int) -> None:
        if span in self._indexes:
            self._indexes[span].drop(number)

    def take_pages_to_spill(self) -> tuple[tuple[Span, int], ...]:
        return tuple((span, number) for span, index in self._indexes.items() for number in index.take_spilled())

    def take_dropped_pages(self) -> tuple[tuple[Span, int], ...]:
        return tuple((span, number) for span, index in self._indexes.items() for number in index.take_dropped())
