"""What the scheduler keeps of a sequence, and what it hands the worker for a step. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.prefix import PAGE_TOKENS, further_names
from mesh.view import Span
from node.engine.api import OpenSequence, SequenceKey, SequenceLost
from node.engine.blocks import BlockPool
from node.engine.pages import PageName


@dataclass(frozen=True, slots=True)
class Lane:
    """The layers `[start, end)` of one loaded span."""

    span: Span
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """Activations for `count` positions, as they came off the wire."""

    position: int
    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class PageStore:
    """The keys and values at a sequence's positions `position … position + PAGE_TOKENS - 1` are to be kept as page `number`."""

    key: SequenceKey
    lane: Lane
    position: int
    number: int


@dataclass(slots=True, eq=False)
class Row:
    """One sequence here. `computed` positions have their keys and values stored; `tokens` is empty in the middle of a path."""

    opened: OpenSequence
    lane: Lane
    layers: int  # of the whole model
    hidden_size: int
    age: int  # admission number: the greatest is the youngest
    blocks: list[int]
    tokens: list[int]
    known: int
    computed: int = 0
    served: int = 0  # number of the step that computed it last
    pushed: list[Pushed] = field(default_factory=list)
    pushed_end: int = 0
    names: list[bytes] = field(default_factory=list)  # of its whole pages, as far as they are known here
    names_sent: int = 0  # to the next stage
    pages_kept: int = 0  # of its pages, from the first on: kept in the index, by this sequence or another
    offered: list[int] = field(default_factory=list)  # pages pinned until it is known from where on it computes
    restoring: list[int] = field(default_factory=list)  # pages pinned until its first piece has read them
    cached: int = 0  # tokens taken from pages

    @property
    def key(self) -> SequenceKey:
        return self.opened.key

    @property
    def first(self) -> bool:
        return self.lane.start == 0

    @property
    def last(self) -> bool:
        return self.lane.end == self.layers

    @property
    def limit(self) -> int:
        """The position behind the last token that may be drawn."""
        return self.opened.prompt_tokens + self.opened.sampling.max_tokens

    @property
    def ready(self) -> int:
        """Positions that could be computed now."""
        return (self.known if self.first else self.pushed_end) - self.computed

    @property
    def settled(self) -> int:
        """Positions whose keys and values are final."""
        return min(self.computed, self.known) if self.first or self.last else self.computed

    def learn_names(self) -> None:
        """Names the pages that have become whole, where the tokens are known here and nobody else names them."""
        prefix = self.opened.prefix
        if prefix is not None and self.first and len(self.tokens) // PAGE_TOKENS > len(self.names):
            self.names += further_names(prefix.salt, self.names, self.tokens)

    def page_name(self, page: int) -> PageName:
        prefix = self.opened.prefix
        assert prefix is not None
        return PageName(self.lane.start, self.lane.end, prefix.numerics, self.names[page])


@dataclass(frozen=True, slots=True)
class Piece:
    """One row's share of a step: positions `position … position + count - 1`, as tokens or as pushed activations."""

    row: Row
    position: int
    count: int
    tokens: tuple[int, ...] = ()
    pushed: tuple[Pushed, ...] = ()  # may begin before `position` and end behind the piece
    restore: tuple[int, ...] = ()  # pages that hold all positions before; read before anything is computed
    names: tuple[bytes, ...] = ()  # for the next stage: of the pages that have become whole
    draws: bool = False  # the logits behind its last position give the next token
    history: tuple[int, ...] = ()  # with `draws`: all tokens so far, if sampling or a grammar looks at them
    stop_ids: frozenset[int] = frozenset()  # with `draws`: tokens that end the sequence


@dataclass(frozen=True, slots=True)
class StepPlan:
    number: int
    lane: Lane | None  # None: nothing to compute
    pieces: tuple[Piece, ...]
    lost: tuple[SequenceLost, ...]
    freed: tuple[SequenceKey, ...]  # sequences gone since the last plan: their tensors can go
    dropped: tuple[tuple[Span, int], ...] = ()  # pages gone since the last plan


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the sampler made of a piece that draws; `token` None: no token can be drawn from these logits."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    ends: bool = False  # the grammar allows nothing behind this token
    why_none: str = ""  # with no token: the reason, where it is not the logits


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    sequences: int
    blocks_used: int
    blocks_total: int
    steps: int
    opened: int
    finished: int
    evicted: int
    failed: int
    dropped: int  # pushes, tokens and opens that came twice, too early or too late
    pages: int = 0
    prompt_tokens: int = 0  # of all sequences that a first stage took up
    cached_tokens: int = 0  # those of them that pages held


@dataclass(frozen=True, slots=True, eq=False)
class HeldSpan:
    """What the scheduler must know of a loaded span."""

    pool: BlockPool
    layers: int  # of the whole model
    hidden_size: int
    vocab_size: int
    max_model_len: int
    end_ids: frozenset[int]  # the model's own end-of-sequence tokens
