"""The state of one sequence on one stage, the part of it that a step computes (a chunk), and the plan of a step. No torch.

The tokens at the positions below `known` are certain; `draft` holds guessed tokens for the positions from `known` on. The first
and the last stage of a path see tokens and take each drawn token by `confirm_token`; a stage between them infers from pushed
activations how many tokens are certain. A wrong guess voids everything computed from its position on, at every stage: the first
and the last stage detect the wrong guess at the same token and count it (`rewinds`), and the count travels with the activations.
A stage compares the counts, so that it drops late activations that were computed from an older, wrong guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mesh.prefix import NAME_BYTES, PREFIX_PAGE_TOKENS, further_names
from mesh.view import Span
from node.engine.api import HiddenOut, Lane, OpenSequence, SequenceKey, SequenceLost
from node.engine.kv.prefix_index import PageName
from node.engine.scheduling.speculation import DraftLength, NgramLookup


@dataclass(frozen=True, slots=True)
class PushedActivations:
    """Activations for `count` positions in wire format, not yet decoded."""

    position: int
    count: int
    data: bytes

    @property
    def end(self) -> int:
        return self.position + self.count

    def before(self, position: int) -> PushedActivations:
        """Returns the part before `position`; `position` must be greater than `self.position`."""
        assert position > self.position
        count = min(self.count, position - self.position)
        return PushedActivations(self.position, count, self.data[: len(self.data) // self.count * count])


@dataclass(slots=True, eq=False)
class StageSequence:
    """The keys and values of the first `computed` positions are stored; `tokens` is empty on a stage between first and last."""

    request: OpenSequence
    lane: Lane
    model_layers: int
    hidden_size: int
    number: int  # counts admissions: the greatest number is the youngest sequence
    tokens: list[int]
    known: int
    admitted_step: int = 0  # number of the last step that was planned before the admission
    served_step: int = 0  # number of the last step that computed this sequence
    page_names: list[bytes] = field(default_factory=list)  # names of its whole pages, as far as this stage has them
    page_names_sent: int = 0  # how many of the names the next stage has
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    planned_at_s: float = 0.0  # when step `served_step` was planned
    deadline_s: float = math.inf
    pushed: list[PushedActivations] = field(default_factory=list)
    pushed_end: int = 0
    pages_kept: int = 0  # how many of its pages, from the first on, are in the page index, added by any sequence
    offered_pages: list[int] = field(default_factory=list)  # pinned until the start position is decided
    restoring_pages: list[int] = field(default_factory=list)  # pinned until the first chunk has read them
    cached_tokens: int = 0  # taken from pages when the sequence was opened
    draft: list[int] = field(default_factory=list)  # guessed tokens for the positions known, known + 1, …
    draft_length: int = 0  # of the draft when this stage made it; 0: this stage made none
    rewinds: int = 0  # wrong guesses so far
    void_from: float = math.inf  # the step under way computes a wrong guess from this position on
    ngram_lookup: NgramLookup = field(default_factory=NgramLookup)
    next_draft: DraftLength = field(default_factory=DraftLength)
    preempted: bool = False  # holds no blocks, and is computed again once enough are free
    isolated: bool = False  # a step with this sequence failed, so the next step computes this sequence alone

    @property
    def key(self) -> SequenceKey:
        return self.request.key

    @property
    def on_first_stage(self) -> bool:
        return self.lane.start == 0

    @property
    def on_last_stage(self) -> bool:
        return self.lane.end == self.model_layers

    @property
    def end_position(self) -> int:
        """The position behind the last token that may be drawn."""
        return self.request.prompt_tokens + self.request.sampling.max_tokens

    @property
    def ready(self) -> int:
        """How many positions could be computed now, without new guesses."""
        return 0 if self.preempted else (self.known if self.on_first_stage else self.pushed_end) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether the ready positions are one token and the guesses behind it, not a part of a prefill."""
        return self.ready - len(self.draft) <= 1

    @property
    def final_positions(self) -> int:
        """How many positions have keys and values that no wrong guess can void."""
        return min(self.computed, self.known)

    # ---- first and last stage: tokens

    def confirm_token(self, token: int) -> bool:
        """Appends the token drawn for position `known`. Returns whether it was guessed right."""
        assert len(self.tokens) == self.known
        guessed_right = bool(self.draft) and self.draft[0] == token
        if guessed_right:
            del self.draft[0]
            if self.draft_length and not self.draft:
                self.next_draft.verified(self.draft_length, self.draft_length)
        elif self.draft:
            if self.draft_length:
                self.next_draft.verified(self.draft_length, self.draft_length - len(self.draft))
            self._void(self.known)
        if not self.draft:
            self.draft_length = 0
        self.tokens.append(token)
        self.known += 1
        return guessed_right

    def _void(self, position: int) -> None:
        """Discards everything computed or received from `position` on: the guess at `position` was wrong."""
        self.rewinds += 1
        self.draft = []
        self.computed = min(self.computed, position)
        self.pushed, self.pushed_end = [], self.computed

    def propose_draft(self, max_tokens: int) -> tuple[int, ...]:
        """Returns guesses for the next tokens; called once a step, on the first stage, with only the newest token uncomputed."""
        assert self.on_first_stage and not self.draft
        # The last token of the answer is drawn but never computed, so a guess for its position would be of no use.
        wanted = min(max_tokens, self.next_draft.next_length(), self.end_position - 1 - self.known)
        return self.ngram_lookup.guess(self.tokens, wanted) if wanted > 0 else ()

    # ---- later stages: activations

    def accepts(self, hidden: HiddenOut) -> bool:
        """Returns whether activations continue this sequence: position, size and type fit, and no voided guess is in them."""
        position, count = hidden.position, hidden.count
        certain_end = position + count - len(hidden.draft)
        if self.on_first_stage or count < 1 or len(hidden.draft) > count or position + count >= self.end_position:
            return False
        # The last stage draws every token, so the sender cannot be certain of a token that was not drawn here.
        if self.on_last_stage and certain_end > max(self.known, position):
            return False
        # Guesses are for positions behind the known tokens; on the last stage the newest known token may be among them.
        if hidden.draft and certain_end < self.known - self.on_last_stage:
            return False
        if hidden.rewinds != self.rewinds:
            # A last stage that never received the wrong guess takes the count from here; it expects exactly this position.
            earliest = self.known - 1 if self.on_last_stage else self.known
            if hidden.rewinds < self.rewinds or not earliest <= position <= self.pushed_end or certain_end == position:
                return False
        elif position != self.pushed_end and not self._can_start_at(position):
            return False
        if len(hidden.data) not in (2 * count * self.hidden_size, 4 * count * self.hidden_size):  # bfloat16 or float32
            return False
        return not hidden.names or self._page_names_valid(hidden)

    def _can_start_at(self, position: int) -> bool:
        """Returns whether nothing was received yet and the offered pages hold every position before `position`."""
        offered_end = len(self.offered_pages) * PREFIX_PAGE_TOKENS
        return self.pushed_end == 0 and position % PREFIX_PAGE_TOKENS == 0 and position <= offered_end

    def _page_names_valid(self, hidden: HiddenOut) -> bool:
        whole_pages = (hidden.position + hidden.count) // PREFIX_PAGE_TOKENS
        named_pages = len(self.page_names) + len(hidden.names)
        valid_sizes = all(len(name) == NAME_BYTES for name in hidden.names)
        return self.request.prefix is not None and named_pages <= whole_pages and valid_sizes

    def append_activations(self, hidden: HiddenOut) -> None:
        """Appends activations for which `accepts` returned True."""
        position, count = hidden.position, hidden.count
        if hidden.rewinds > self.rewinds:
            # A wrong guess was found on another stage. A step under way here may still compute it: its results from
            # `void_from` on are discarded at commit.
            self.rewinds = hidden.rewinds
            self.draft = []
            self.computed = min(self.computed, position)
            self.void_from = min(self.void_from, position)
            self.pushed = [part.before(position) for part in self.pushed if part.position < position]
            self.pushed_end = position
        assert position == self.pushed_end
        guess_position = position + count - len(hidden.draft)
        if guess_position > position:  # the certain positions confirm the guesses before them
            self.draft = []
            self.known = max(self.known, guess_position)
        for guess in hidden.draft:
            # The sender may have split its guesses over two chunks; the tokens for the second may be drawn here by now.
            if guess_position < self.known:
                if self.tokens[guess_position] != guess:
                    self._void(guess_position)
                    return
            else:
                self.draft.append(guess)
            guess_position += 1
        self.pushed.append(PushedActivations(position, count, hidden.data))
        self.pushed_end += count
        self.page_names += hidden.names

    # ---- pages

    def update_page_names(self) -> None:
        """Computes the names of pages that have become whole; the first stage does so, and sends them to the later stages."""
        prefix = self.request.prefix
        if prefix is not None and self.on_first_stage and len(self.tokens) // PREFIX_PAGE_TOKENS > len(self.page_names):
            self.page_names += further_names(prefix.salt, self.page_names, self.tokens)

    def page_name(self, page: int) -> PageName:
        prefix = self.request.prefix
        assert prefix is not None
        return PageName(self.lane.start, self.lane.end, prefix.numerics, self.page_names[page])

    # ---- a step

    def next_chunk(self, count: int, stop_ids: frozenset[int]) -> ScheduledChunk:
        """Returns the next `count` positions as a chunk. `stop_ids`: tokens that end the sequence, should the chunk draw."""
        assert count > 0 and not self.preempted
        assert not self.restoring_pages or self.computed == len(self.restoring_pages) * PREFIX_PAGE_TOKENS
        position, end = self.computed, self.computed + count
        draws = self.on_last_stage and end >= self.known
        sampling = self.request.sampling
        uses_history = (
            sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.repetition_penalty != 1.0
            or sampling.grammar is not None
        )
        self.update_page_names()
        self.void_from = math.inf
        return ScheduledChunk(
            self,
            position,
            count,
            tokens=tuple([*self.tokens, *self.draft][position:end]) if self.on_first_stage else (),
            pushed=() if self.on_first_stage else tuple(part for part in self.pushed if part.position < end),
            restore_pages=tuple(self.restoring_pages),
            page_names=() if self.on_last_stage else tuple(self.page_names[self.page_names_sent :]),
            draft=tuple(self.draft[max(0, position - self.known) : max(0, end - self.known)]),
            rewinds=self.rewinds,
            draws=draws,
            draws_from=self.known,
            history=tuple(self.tokens) if draws and uses_history else (),
            stop_ids=stop_ids if draws else frozenset(),
        )


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One sequence's part of a step: positions `position … position + count - 1`, as tokens or as pushed activations."""

    sequence: StageSequence
    position: int
    count: int
    tokens: tuple[int, ...] = ()
    pushed: tuple[PushedActivations, ...] = ()  # may begin before `position` and end behind the chunk
    restore_pages: tuple[int, ...] = ()  # pages that hold all positions before; read before anything is computed
    page_names: tuple[bytes, ...] = ()  # for the next stage: names of the pages that have become whole
    draft: tuple[int, ...] = ()  # the tokens at the last so many positions are guesses
    rewinds: int = 0  # of the sequence, when this chunk was planned
    draws: bool = False  # the logits behind its last position, and those before its guesses, give the next tokens
    draws_from: int = 0  # with `draws`: the position of the first token to be drawn
    history: tuple[int, ...] = ()  # with `draws`: all tokens so far, if penalties or a grammar depend on them
    stop_ids: frozenset[int] = frozenset()  # with `draws`: tokens that end the sequence


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the worker does for one step."""

    number: int
    lane: Lane | None  # None: nothing to compute
    chunks: tuple[ScheduledChunk, ...]
    lost: tuple[SequenceLost, ...]
    freed: tuple[SequenceKey, ...]  # sequences released since the last plan: the worker drops their tensors
    dropped_pages: tuple[tuple[Span, int], ...] = ()  # since the last plan
    pages_to_spill: tuple[tuple[Span, int], ...] = ()  # after `dropped_pages` are dropped, before the step


@dataclass(frozen=True, slots=True)
class DrawResult:
    """What the sampler drew for one position; `token` None: no token can be drawn from these logits."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    ends: bool = False  # the grammar allows no token behind this one
    why_none: str = ""  # without a token: the reason, unless the logits are the reason
