"""One sequence on one stage: what of it is known, guessed, computed and kept.

Positions below `known` hold tokens that are certain; `draft` are guesses at the positions from there on. A stage that sees
tokens (the first and the last) learns of each drawn one by `confirm`; a stage between learns from what is pushed. A guess
that proves wrong voids what was computed from its position on, everywhere: the first and the last stage see it at the same
token and count it, the count travels with the activations, and by it a stage tells those that are still on their way from an
older guess from those of the tokens that count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mesh.prefix import NAME_BYTES, PREFIX_PAGE_TOKENS, further_names
from node.engine.api import HiddenOut, Lane, OpenSequence, SequenceKey
from node.engine.kv.prefix_index import PageName
from node.engine.scheduling.speculation import DraftLength, NgramLookup


@dataclass(frozen=True, slots=True)
class PushedActivations:
    """Activations for `count` positions, as they came off the wire."""

    position: int
    count: int
    data: bytes

    @property
    def end(self) -> int:
        return self.position + self.count

    def before(self, position: int) -> PushedActivations:
        """The part before `position`, which lies within or behind it."""
        count = min(self.count, position - self.position)
        return PushedActivations(self.position, count, self.data[: len(self.data) // self.count * count])


@dataclass(slots=True, eq=False)
class StageSequence:
    """`computed` positions have their keys and values stored; `tokens` is empty in the middle of a path."""

    opened: OpenSequence
    lane: Lane
    layers: int  # of the whole model
    hidden_size: int
    age: int  # admission number: the greatest is the youngest
    blocks: list[int]
    tokens: list[int]
    known: int
    computed: int = 0
    admitted: int = 0  # number of the step before which it came
    served: int = 0  # number of the step that computed it last
    planned_s: float = 0.0  # when that was planned
    deadline_at: float = math.inf
    pushed: list[PushedActivations] = field(default_factory=list)
    pushed_end: int = 0
    names: list[bytes] = field(default_factory=list)  # of its whole pages, as far as they are known here
    names_sent: int = 0  # to the next stage
    pages_kept: int = 0  # of its pages, from the first on: kept in the index, by this sequence or another
    offered: list[int] = field(default_factory=list)  # pages pinned until it is known from where on it computes
    restoring: list[int] = field(default_factory=list)  # pages pinned until its first chunk has read them
    cached: int = 0  # tokens taken from pages when it was opened
    draft: list[int] = field(default_factory=list)  # guesses at the positions known, known + 1, …
    rewinds: int = 0  # guesses that proved wrong
    void_from: float = math.inf  # from this position on a step under way computes a wrong guess
    lookup: NgramLookup = field(default_factory=NgramLookup)
    pace: DraftLength = field(default_factory=DraftLength)
    guessed: int = 0  # length of the draft when it was made here
    waiting: bool = False  # preempted: it holds no blocks, and goes on when there are some
    alone: bool = False  # a step with it failed: it is tried by itself

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
        return 0 if self.waiting else (self.known if self.first else self.pushed_end) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether what is ready is one token and the guesses behind it, not a part of a prefill."""
        return self.ready - len(self.draft) <= 1

    @property
    def settled(self) -> int:
        """Positions whose keys and values are final."""
        return min(self.computed, self.known)

    # ---- what a first or last stage learns: tokens

    def confirm(self, token: int) -> bool:
        """The token at position `known` is drawn. Returns whether it was guessed right."""
        true = bool(self.draft) and self.draft[0] == token
        if true:
            del self.draft[0]
            if self.guessed and not self.draft:
                self.pace.verified(self.guessed, self.guessed)
        elif self.draft:
            if self.guessed:
                self.pace.verified(self.guessed, self.guessed - len(self.draft))
            self._void(self.known)
        if not self.draft:
            self.guessed = 0
        self.tokens.append(token)
        self.known += 1
        return true

    def _void(self, position: int) -> None:
        """The guess at `position` was wrong."""
        self.rewinds += 1
        self.draft = []
        self.computed = min(self.computed, position)
        self.pushed, self.pushed_end = [], self.computed

    def guess(self, most: int) -> tuple[int, ...]:
        """Asked once a step, of a first stage's row that has all but its newest token computed."""
        wanted = min(most, self.pace.next(), self.limit - 1 - self.known)
        return self.lookup.guess(self.tokens, wanted) if wanted > 0 else ()

    # ---- what later stages learn: activations

    def continues(self, hidden: HiddenOut) -> bool:
        """Whether a peer's activations are what this row waits for: in place, size and type, and not of a void guess."""
        position, count, certain = hidden.position, hidden.count, hidden.position + hidden.count - len(hidden.draft)
        if self.first or count < 1 or len(hidden.draft) > count or position + count >= self.limit:
            return False
        if self.last and certain > max(self.known, position):
            return False
        if hidden.draft and certain < self.known - self.last:  # guesses stand behind what is known, or at its very end
            return False
        if hidden.rewinds != self.rewinds:
            # A last stage that was never sent the wrong guess learns of it here; it waits for just this position.
            earliest = self.known - 1 if self.last else self.known
            if hidden.rewinds < self.rewinds or not earliest <= position <= self.pushed_end or certain == position:
                return False
        elif position != self.pushed_end and not self._may_begin_at(position):
            return False
        if len(hidden.data) not in (2 * count * self.hidden_size, 4 * count * self.hidden_size):
            return False
        return not hidden.names or self._may_name(hidden)

    def _may_begin_at(self, position: int) -> bool:
        return self.pushed_end == 0 and position % PREFIX_PAGE_TOKENS == 0 and position <= len(self.offered) * PREFIX_PAGE_TOKENS

    def _may_name(self, hidden: HiddenOut) -> bool:
        whole = (hidden.position + hidden.count) // PREFIX_PAGE_TOKENS
        named = len(self.names) + len(hidden.names)
        return self.opened.prefix is not None and named <= whole and all(len(name) == NAME_BYTES for name in hidden.names)

    def take(self, hidden: HiddenOut) -> None:
        """Activations that continue this row."""
        position, count = hidden.position, hidden.count
        if hidden.rewinds > self.rewinds:
            self.rewinds = hidden.rewinds
            self.draft = []
            self.computed = min(self.computed, position)
            self.void_from = min(self.void_from, position)
            self.pushed = [part.before(position) for part in self.pushed if part.position < position]
            self.pushed_end = position
        at = position + count - len(hidden.draft)
        if at > position:  # its certain positions confirm the guesses before them
            self.draft = []
            self.known = max(self.known, at)
        for guess in hidden.draft:
            if at < self.known:  # drawn here meanwhile: the sender had cut its guesses in two
                if self.tokens[at] != guess:
                    self._void(at)
                    return
            else:
                self.draft.append(guess)
            at += 1
        self.pushed.append(PushedActivations(position, count, hidden.data))
        self.pushed_end += count
        self.names += hidden.names

    # ---- pages

    def learn_names(self) -> None:
        """Names the pages that have become whole, where the tokens are known here and no other stage names them."""
        prefix = self.opened.prefix
        if prefix is not None and self.first and len(self.tokens) // PREFIX_PAGE_TOKENS > len(self.names):
            self.names += further_names(prefix.salt, self.names, self.tokens)

    def page_name(self, page: int) -> PageName:
        prefix = self.opened.prefix
        assert prefix is not None
        return PageName(self.lane.start, self.lane.end, prefix.numerics, self.names[page])
