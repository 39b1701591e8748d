"""Decides which sequences the next step computes. A core: no torch, no clock, no threads.

A *lane* is a loaded span and the layers of it that are asked for. A step takes sequences of one lane, and lanes with work take
turns; within a lane `step_selection` splits the step's token budget. Any mixture gives the same tokens (`docs/architecture.md`),
so fairness costs no exactness. For the same reason a sequence may compute guessed tokens (`speculation`) and begin behind cached
prefix pages.

A sequence holds KV blocks for the tokens known when it was admitted and takes more as it grows. When none is free, the least
important sequence of that span, and of those the youngest, gives its blocks up: the most important one always finishes, so there
is no livelock. The evicted sequence is lost here and its entry continues it elsewhere; without another node it waits here and is
recomputed before anything new is admitted. A step that fails is retried sequence by sequence, so that only the faulty one fails.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from mesh.errors import BadRequest, LocalError, Refused
from mesh.ids import StreamId
from mesh.prefix import NAME_BYTES, PREFIX_PAGE_TOKENS
from mesh.view import Load, Span
from node.engine.api import HiddenOut, Lane, OpenSequence, SequenceKey, SequenceLost, TokenOut
from node.engine.kv.blocks import blocks_for
from node.engine.kv.prefix_index import PageCopy, PageName
from node.engine.scheduling.kv_allocator import KvAllocator
from node.engine.scheduling.sequence import StageSequence
from node.engine.scheduling.step_plan import Drawn, HeldSpan, ScheduledChunk, SchedulerStatistics, StepPlan, piece_of
from node.engine.scheduling.step_selection import StepSelection


def check(sequence: OpenSequence, held: HeldSpan) -> None:
    """Raises BadRequest: the sequence can never be served by this span, or says things that cannot be."""
    end = sequence.prompt_tokens + sequence.sampling.max_tokens
    if held.whole_only and (sequence.start, sequence.end) != (0, held.layers):
        raise BadRequest(f"{sequence.model} is served whole only, not its layers {sequence.start}:{sequence.end}", param="layers")
    if end > held.max_model_len:
        raise BadRequest(
            f"{sequence.prompt_tokens} prompt tokens and {sequence.sampling.max_tokens} new ones exceed the context of "
            f"{held.max_model_len} tokens; shorten the prompt or lower max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if not 1 <= sequence.prompt_tokens <= sequence.known < end:
        raise BadRequest(f"expected 1 <= prompt tokens <= known tokens < {end}, got {sequence.prompt_tokens}, {sequence.known}")
    if blocks_for(end) > held.pool.total:
        raise BadRequest(f"{end} tokens need {blocks_for(end)} KV blocks, but this node has {held.pool.total} in all")
    if sequence.start == 0 or sequence.end == held.layers:
        _check_tokens(sequence, held)
    prefix = sequence.prefix
    if prefix is not None:
        whole = sequence.known // PREFIX_PAGE_TOKENS
        if len(prefix.names) != whole or any(len(name) != NAME_BYTES for name in prefix.names):
            raise BadRequest(f"expected {whole} names of {NAME_BYTES} bytes for the pages of {sequence.known} tokens")


def _check_tokens(sequence: OpenSequence, held: HeldSpan) -> None:
    if len(sequence.tokens) != sequence.known:
        raise BadRequest(f"expected all {sequence.known} known tokens at the first and last stage, got {len(sequence.tokens)}")
    worst = max(sequence.tokens, key=lambda token: token if token >= 0 else held.vocab_size - token)
    if not 0 <= worst < held.vocab_size:
        raise BadRequest(f"token {worst} is outside the vocabulary of {held.vocab_size}", param="prompt")


class Scheduler:
    """Every method takes microseconds. The caller holds a lock around each; a step runs between `plan` and `commit`.

    `now`: seconds of any clock that only goes forward.
    """

    def __init__(self, step_tokens: int, max_sequences: int, speculates: bool = True) -> None:
        if step_tokens < 1 or max_sequences < 1:
            raise LocalError(f"expected a positive token budget and sequence limit, got {step_tokens} and {max_sequences}")
        self.max_sequences = max_sequences
        self.choosing = StepSelection(step_tokens, speculates)
        self._rooms = KvAllocator()
        self._rows: dict[SequenceKey, StageSequence] = {}
        self._turns: dict[Lane, int] = {}  # number of the step that served the lane last
        self._freed: list[SequenceKey] = []
        self._steps = self._opened = self._finished = self._evicted = self._failed = self._dropped = 0
        self._prompt_tokens = self._cached_tokens = self._true_guesses = 0
        self._preempted = self._overdue = self._isolated = 0

    # ---- spans

    def add_span(self, span: Span, held: HeldSpan) -> None:
        """Serves `span` from now on; a span that is there already stays as it is."""
        self._rooms.add(span, held)

    def drop_span(self, span: Span) -> list[SequenceLost]:
        """Forgets a span; its sequences are lost, and may go elsewhere."""
        rows = [row for row in self._rows.values() if row.lane.span == span]
        for row in rows:
            self._forget(row)
        self._rooms.drop(span)
        self.choosing.forget(span)
        return [SequenceLost(row.key, f"layers {span.start}:{span.end} of {span.model} were unloaded") for row in rows]

    def fit_pages(self, spill_rooms: Mapping[Span, int]) -> None:
        """The pools have other sizes now, and so many pages of each span may be spilled."""
        self._rooms.fit(spill_rooms)

    def span_for(self, sequence: OpenSequence) -> Span:
        """Raises LocalError: none that is loaded holds its layers."""
        return self._rooms.span_for(sequence)

    def find_pages(self, span: Span, names: Sequence[PageName]) -> list[int]:
        """The numbers of the pages that are kept, up to the first that is not."""
        return self._rooms.find_pages(span, names)

    def add_page(self, span: Span, name: PageName) -> int | None:
        """As `PageIndex.add`; the caller holds the lock until its content is stored."""
        return self._rooms.add_page(span, name)

    # ---- sequences

    def open(self, sequence: OpenSequence, now: float = 0.0) -> int:
        """As `Engine.open`; a sequence that is open already stays as it is."""
        if sequence.key in self._rows:
            self._dropped += 1
            return 0
        span = self._rooms.span_for(sequence)
        held = self._rooms.spans[span]
        check(sequence, held)
        there = [row for row in self._rows.values() if row.lane.span == span]
        if len(there) >= self.max_sequences:
            raise Refused(f"{self.max_sequences} sequences are running on layers {span.start}:{span.end} of {span.model}")
        row = StageSequence(
            sequence,
            Lane(span, sequence.start, sequence.end),
            held.layers,
            held.hidden_size,
            self._opened + 1,
            [],
            list(sequence.tokens),
            sequence.known,
            admitted=self._steps,
            served=self._steps,
            names=list(sequence.prefix.names) if sequence.prefix is not None else [],
        )
        row.names_sent = len(row.names)
        if sequence.remaining_ms is not None:
            row.deadline_at = now + sequence.remaining_ms / 1e3
        if any(other.waiting for other in there) or not self._rooms.give(row):
            free = self._rooms.free(span)
            raise Refused(f"no room for {sequence.known} tokens: {free} of {held.pool.total} KV blocks are free")
        row.cached = row.computed
        if row.first:
            self._prompt_tokens += row.known
            self._cached_tokens += row.cached
        self._opened += 1
        self._rows[sequence.key] = row
        return len(row.offered) + len(row.restoring)

    def push(self, hidden: HiddenOut) -> None:
        """Takes activations that continue what came before; all else is counted and dropped."""
        row = self._rows.get(hidden.key)
        if row is None or not row.continues(hidden):
            self._dropped += 1
            return
        if hidden.position and row.pushed_end == 0:
            self._rooms.begin(row, hidden.position)
            row.cached = hidden.position
        row.take(hidden)

    def token(self, key: SequenceKey, position: int, token: int, now: float = 0.0) -> None:
        """The token at `position`, for a first stage that is not also the last; all else is counted and dropped."""
        row = self._rows.get(key)
        if row is None or not row.first or row.last or position != row.known or row.known + 1 >= row.limit:
            self._dropped += 1
            return
        if not 0 <= token < self._rooms.spans[row.lane.span].vocab_size:
            self._dropped += 1
            return
        self._true_guesses += row.confirm(token)
        self.choosing.came_back(row, now)

    def close(self, key: SequenceKey) -> None:
        row = self._rows.get(key)
        if row is not None:
            self._forget(row)

    def close_streams(self, keep: Callable[[StreamId], bool]) -> None:
        for row in [row for row in self._rows.values() if not keep(row.opened.stream)]:
            self._forget(row)

    def _forget(self, row: StageSequence) -> None:
        del self._rows[row.key]
        self._rooms.give_up(row)
        self._freed.append(row.key)

    # ---- steps

    def has_work(self, now: float = 0.0) -> bool:
        return self.work_at_s(now) <= now

    def work_at_s(self, now: float) -> float:
        """When there is something to plan, if nothing happens until then; infinite: not before something does."""
        if self._freed or any(row.waiting and self._rooms.may_give(row) for row in self._rows.values()):
            return now
        return min((self.choosing.begins_s(rows, now) for rows in self._ready_lanes().values()), default=math.inf)

    def _ready_lanes(self) -> dict[Lane, list[StageSequence]]:
        """All rows of the lanes in which some could be computed."""
        rows = defaultdict[Lane, list[StageSequence]](list)
        for row in self._rows.values():
            rows[row.lane].append(row)
        return {lane: there for lane, there in rows.items() if any(row.ready > 0 for row in there)}

    def plan(self, now: float = 0.0) -> StepPlan:
        """The next step. Its blocks stay held until `commit`, whatever is closed meanwhile."""
        lost = self._drop_overdue(now)
        self._readmit()
        lane = self._next_lane(now)
        pieces: list[ScheduledChunk] = []
        if lane is not None:
            self._steps += 1
            for row, count in self._chosen(lane, now):
                if row.key in self._rows and self._grow(row, row.computed + count + 1, lost):
                    pieces.append(piece_of(row, count, self._stop_ids(row)))
            pieces = [piece for piece in pieces if self._rows.get(piece.row.key) is piece.row and not piece.row.waiting]
            for piece in pieces:
                piece.row.served, piece.row.planned_s = self._steps, now
                self._rooms.hold(piece)
        freed, self._freed = tuple(self._freed), []
        gone = self._rooms.dropped_pages(), self._rooms.spilling_pages()
        return StepPlan(self._steps, lane if pieces else None, tuple(pieces), tuple(lost), freed, *gone)

    def _drop_overdue(self, now: float) -> list[SequenceLost]:
        """Nobody waits for them any more, so they cost no step."""
        overdue = [row for row in self._rows.values() if row.deadline_at <= now]
        for row in overdue:
            self._overdue += 1
            self._forget(row)
        return [SequenceLost(row.key, "the request's deadline passed") for row in overdue]

    def _readmit(self) -> None:
        """Preempted sequences go on, the most important first, as soon as there is room for what they know."""
        for row in sorted((row for row in self._rows.values() if row.waiting), key=_standing):
            if not self._rooms.give(row):
                return
            row.waiting = False

    def _next_lane(self, now: float) -> Lane | None:
        """The lane with work that was served longest ago; a new one counts as never served."""
        ready = {lane: rows for lane, rows in self._ready_lanes().items() if self.choosing.begins_s(rows, now) <= now}
        if not ready:
            return None
        lane = min(ready, key=lambda lane: (self._turns.get(lane, -1), min(row.age for row in ready[lane] if row.ready > 0)))
        in_use = {row.lane for row in self._rows.values()}
        self._turns = {kept: step for kept, step in self._turns.items() if kept in in_use} | {lane: self._steps + 1}
        return lane

    def _chosen(self, lane: Lane, now: float) -> list[tuple[StageSequence, int]]:
        """The rows of the next step with their counts of positions, guesses among them."""
        chosen = self.choosing.rows(lane, (row for row in self._rows.values() if row.lane == lane), self._steps, now)
        if lane.start > 0 or not self._rooms.spans[lane.span].exact:
            return chosen
        return self.choosing.with_guesses(chosen, self._rooms.spare)

    def _grow(self, row: StageSequence, tokens: int, lost: list[SequenceLost]) -> bool:
        """Gives `row` room for `tokens`; while there is none the least of its span goes. False: that was `row` itself."""
        if row.waiting:
            return False
        while not self._rooms.grow(row, tokens):
            rivals = (other for other in self._rows.values() if other.lane.span == row.lane.span and other.blocks)
            least = max(rivals, key=_standing)
            if least.opened.last_choice and least.first and least.last:
                self._preempt(least)
            else:
                self._evicted += 1
                self._forget(least)
                lost.append(SequenceLost(least.key, "evicted: no KV block was free, and it was the youngest sequence"))
            if least is row:
                return False
        return True

    def _preempt(self, row: StageSequence) -> None:
        """It waits here for blocks and begins anew; what pages hold of it by then it need not compute."""
        self._preempted += 1
        self._rooms.give_up(row)
        self._freed.append(row.key)
        row.waiting, row.computed, row.draft, row.guessed = True, 0, [], 0

    def commit(self, plan: StepPlan, drawn: Mapping[SequenceKey, Sequence[Drawn]]) -> list[TokenOut | SequenceLost]:
        """Takes the step's results up; nothing comes of sequences that were closed in mid-step."""
        outputs: list[TokenOut | SequenceLost] = []
        for piece in plan.pieces:
            row = piece.row
            if self._rows.get(row.key) is not row:
                continue
            row.alone = False
            row.computed = int(min(piece.position + piece.count, row.void_from))
            row.pushed = [part for part in row.pushed if part.end > row.computed]
            row.names_sent += len(piece.names)
            self._rooms.keep_pages(row)
            if piece.draws:
                outputs += self._take_drawn(piece, drawn[row.key])
        self._rooms.end_step()
        return outputs

    def pages_to_store(self) -> list[PageCopy]:
        """What the last commit wants kept; to be copied before the next plan."""
        return self._rooms.pages_to_store()

    def pages_lost(self, span: Span, numbers: Sequence[int], plan: StepPlan | None = None) -> list[SequenceLost]:
        """What pages hold could not be kept, or not be read by the step `plan`. Who counted on it computes it again.

        Only a sequence whose path goes over other stages is lost here, for they count on it too; it may go anywhere.
        """
        if plan is not None:
            self._again(plan)
        rows = [row for row in self._rows.values() if row.lane.span == span]
        rows = [row for row in rows if not set(numbers).isdisjoint([*row.offered, *row.restoring])]
        alone = [row for row in rows if row.first and row.last]
        for row in alone:
            self._cached_tokens -= row.cached
            row.cached = 0
            self._preempt(row)
        spread = [row for row in rows if row not in alone]
        for row in spread:
            self._forget(row)
        for number in numbers:
            self._rooms.drop_page(span, number)
        return [SequenceLost(row.key, "a page it counted on was not kept") for row in spread]

    def _take_drawn(self, piece: ScheduledChunk, drawn: Sequence[Drawn]) -> list[TokenOut | SequenceLost]:
        """One token, and one for each guess before it that was right."""
        row, outputs = piece.row, list[TokenOut | SequenceLost]()
        for each in drawn:
            position, sampling = row.known, row.opened.sampling
            if each.token is None:
                self._failed += 1
                self._forget(row)
                reason = each.why_none or "the model gave no usable logits (not a number, or nothing left to draw)"
                return [*outputs, SequenceLost(row.key, reason, retryable=False)]
            finish = None
            late_enough = position - row.opened.prompt_tokens >= sampling.min_tokens
            if each.ends or (each.token in piece.stop_ids and late_enough):
                finish = "stop"
            elif position + 1 >= row.limit:
                finish = "length"
            outputs.append(TokenOut(row.key, position, each.token, finish, each.logprob, each.top, row.cached))
            if finish is not None:
                self._finished += 1
                self._forget(row)
                return outputs
            was_true = row.confirm(each.token)
            self._true_guesses += was_true and row.first
            if not was_true:
                return outputs
        return outputs

    def _stop_ids(self, row: StageSequence) -> frozenset[int]:
        """Tokens that end this sequence; `ignore_eos` takes the model's own out, wherever they came from."""
        stops = frozenset(row.opened.sampling.stop_token_ids)
        return stops - self._rooms.spans[row.lane.span].end_ids if row.opened.sampling.ignore_eos else stops

    def out_of_memory(self, plan: StepPlan) -> list[SequenceLost]:
        """There was no memory for the step: its least important sequence is lost, the others are tried again."""
        rows = self._again(plan)
        if not rows:
            return []
        least = max(rows, key=_standing)
        self._failed += 1
        self._forget(least)
        return [SequenceLost(least.key, "out of memory, and it was the youngest sequence of the step")]

    def fail(self, plan: StepPlan, reason: str) -> list[SequenceLost]:
        """The step failed. A sequence that was alone in it is lost; of several each is tried alone, and all others go on."""
        rows = self._again(plan)
        if len(rows) == 1 and len(plan.pieces) == 1:
            self._failed += 1
            self._forget(rows[0])
            return [SequenceLost(rows[0].key, reason)]
        self._isolated += 1
        for row in rows:
            row.alone = True
        return []

    def _again(self, plan: StepPlan) -> list[StageSequence]:
        """Nothing came of the step: its rows are as they were before it."""
        rows = [piece.row for piece in plan.pieces if self._rows.get(piece.row.key) is piece.row]
        for row in rows:
            if row.first:
                row.draft, row.guessed = [], 0
        self._rooms.end_step()
        return rows

    # ---- figures

    def load(self) -> Load:
        rows = self._rows.values()
        return Load(
            running=len(self._rows),
            waiting=sum(row.computed == 0 for row in rows),
            kv_blocks_used=self._rooms.used,
            kv_blocks_total=self._rooms.total,
            prefill_tokens_queued=sum(row.opened.known - row.computed for row in rows if row.opened.known - row.computed > 1),
        )

    def statistics(self) -> SchedulerStatistics:
        load = self.load()
        return SchedulerStatistics(
            sequences=load.running,
            blocks_used=load.kv_blocks_used,
            blocks_total=load.kv_blocks_total,
            steps=self._steps,
            opened=self._opened,
            finished=self._finished,
            evicted=self._evicted,
            failed=self._failed,
            dropped=self._dropped,
            pages=self._rooms.pages,
            spilled_pages=self._rooms.spilled_pages,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            guessed_tokens=self.choosing.guessed_tokens,
            true_guesses=self._true_guesses,
            preempted=self._preempted,
            overdue=self._overdue,
            isolated=self._isolated,
        )


def _standing(row: StageSequence) -> tuple[int, int]:
    """Who gives way is the greatest: the least important, and of those the youngest."""
    return row.opened.priority, row.age
