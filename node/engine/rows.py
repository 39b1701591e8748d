"""What the scheduler keeps of a sequence, and what it hands the worker for a step. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.view import Span
from node.engine.api import OpenSequence, SequenceKey, SequenceLost
from node.engine.blocks import BlockPool


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


@dataclass(frozen=True, slots=True)
class Piece:
    """One row's share of a step: positions `position … position + count - 1`, as tokens or as pushed activations."""

    row: Row
    position: int
    count: int
    tokens: tuple[int, ...] = ()
    pushed: tuple[Pushed, ...] = ()  # may begin before `position` and end behind the piece
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


@dataclass(frozen=True, slots=True, eq=False)
class HeldSpan:
    """What the scheduler must know of a loaded span."""

    pool: BlockPool
    layers: int  # of the whole model
    hidden_size: int
    vocab_size: int
    max_model_len: int
    end_ids: frozenset[int]  # the model's own end-of-sequence tokens
