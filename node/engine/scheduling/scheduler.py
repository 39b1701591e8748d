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
from node.engine.scheduling.step_plan import Drawn, HeldSpan, ScheduledChunk, SchedulerStatistics, StepPlan, chunk_of
from node.engine.scheduling.step_selection import StepSelection


def check(request: OpenSequence, held: HeldSpan) -> None:
    """Raises BadRequest: the sequence can never be served by this span, or says things that cannot be."""
    end = request.prompt_tokens + request.sampling.max_tokens
    if held.whole_only and (request.start, request.end) != (0, held.layers):
        raise BadRequest(f"{request.model} is served whole only, not its layers {request.start}:{request.end}", param="layers")
    if end > held.max_model_len:
        raise BadRequest(
            f"{request.prompt_tokens} prompt tokens and {request.sampling.max_tokens} new ones exceed the context of "
            f"{held.max_model_len} tokens; shorten the prompt or lower max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if not 1 <= request.prompt_tokens <= request.known < end:
        raise BadRequest(f"expected 1 <= prompt tokens <= known tokens < {end}, got {request.prompt_tokens}, {request.known}")
    if blocks_for(end) > held.pool.total:
        raise BadRequest(f"{end} tokens need {blocks_for(end)} KV blocks, but this node has {held.pool.total} in all")
    if request.start == 0 or request.end == held.layers:
        _check_tokens(request, held)
    prefix = request.prefix
    if prefix is not None:
        whole = request.known // PREFIX_PAGE_TOKENS
        if len(prefix.names) != whole or any(len(name) != NAME_BYTES for name in prefix.names):
            raise BadRequest(f"expected {whole} names of {NAME_BYTES} bytes for the pages of {request.known} tokens")


def _check_tokens(request: OpenSequence, held: HeldSpan) -> None:
    if len(request.tokens) != request.known:
        raise BadRequest(f"expected all {request.known} known tokens at the first and last stage, got {len(request.tokens)}")
    worst = max(request.tokens, key=lambda token: token if token >= 0 else held.vocab_size - token)
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
        self.selection = StepSelection(step_tokens, speculates)
        self._allocator = KvAllocator()
        self._sequences: dict[SequenceKey, StageSequence] = {}
        self._turns: dict[Lane, int] = {}  # number of the step that served the lane last
        self._freed: list[SequenceKey] = []
        self._steps = self._opened = self._finished = self._evicted = self._failed = self._dropped = 0
        self._prompt_tokens = self._cached_tokens = self._true_guesses = 0
        self._preempted = self._overdue = self._isolated = 0

    # ---- spans

    def add_span(self, span: Span, held: HeldSpan) -> None:
        """Serves `span` from now on; a span that is there already stays as it is."""
        self._allocator.add(span, held)

    def drop_span(self, span: Span) -> list[SequenceLost]:
        """Forgets a span; its sequences are lost, and may go elsewhere."""
        sequences = [sequence for sequence in self._sequences.values() if sequence.lane.span == span]
        for sequence in sequences:
            self._forget(sequence)
        self._allocator.drop(span)
        self.selection.forget(span)
        return [
            SequenceLost(sequence.key, f"layers {span.start}:{span.end} of {span.model} were unloaded") for sequence in sequences
        ]

    def fit_pages(self, spill_rooms: Mapping[Span, int]) -> None:
        """The pools have other sizes now, and so many pages of each span may be spilled."""
        self._allocator.fit(spill_rooms)

    def span_for(self, request: OpenSequence) -> Span:
        """Raises LocalError: none that is loaded holds its layers."""
        return self._allocator.span_for(request)

    def find_pages(self, span: Span, names: Sequence[PageName]) -> list[int]:
        """The numbers of the pages that are kept, up to the first that is not."""
        return self._allocator.find_pages(span, names)

    def add_page(self, span: Span, name: PageName) -> int | None:
        """As `PageIndex.add`; the caller holds the lock until its content is stored."""
        return self._allocator.add_page(span, name)

    # ---- sequences

    def open(self, request: OpenSequence, now: float = 0.0) -> int:
        """As `Engine.open`; a sequence that is open already stays as it is."""
        if request.key in self._sequences:
            self._dropped += 1
            return 0
        span = self._allocator.span_for(request)
        held = self._allocator.spans[span]
        check(request, held)
        there = [sequence for sequence in self._sequences.values() if sequence.lane.span == span]
        if len(there) >= self.max_sequences:
            raise Refused(f"{self.max_sequences} sequences are running on layers {span.start}:{span.end} of {span.model}")
        sequence = StageSequence(
            request,
            Lane(span, request.start, request.end),
            held.layers,
            held.hidden_size,
            self._opened + 1,
            [],
            list(request.tokens),
            request.known,
            admitted=self._steps,
            served=self._steps,
            names=list(request.prefix.names) if request.prefix is not None else [],
        )
        sequence.names_sent = len(sequence.names)
        if request.remaining_ms is not None:
            sequence.deadline_at = now + request.remaining_ms / 1e3
        if any(other.waiting for other in there) or not self._allocator.give(sequence):
            free = self._allocator.free(span)
            raise Refused(f"no room for {request.known} tokens: {free} of {held.pool.total} KV blocks are free")
        sequence.cached = sequence.computed
        if sequence.first:
            self._prompt_tokens += sequence.known
            self._cached_tokens += sequence.cached
        self._opened += 1
        self._sequences[request.key] = sequence
        return len(sequence.offered) + len(sequence.restoring)

    def push(self, hidden: HiddenOut) -> None:
        """Takes activations that continue what came before; all else is counted and dropped."""
        sequence = self._sequences.get(hidden.key)
        if sequence is None or not sequence.continues(hidden):
            self._dropped += 1
            return
        if hidden.position and sequence.pushed_end == 0:
            self._allocator.begin(sequence, hidden.position)
            sequence.cached = hidden.position
        sequence.take(hidden)

    def token(self, key: SequenceKey, position: int, token: int, now: float = 0.0) -> None:
        """The token at `position`, for a first stage that is not also the last; all else is counted and dropped."""
        sequence = self._sequences.get(key)
        if (
            sequence is None
            or not sequence.first
            or sequence.last
            or position != sequence.known
            or sequence.known + 1 >= sequence.limit
        ):
            self._dropped += 1
            return
        if not 0 <= token < self._allocator.spans[sequence.lane.span].vocab_size:
            self._dropped += 1
            return
        self._true_guesses += sequence.confirm(token)
        self.selection.tokens_returned(sequence, now)

    def close(self, key: SequenceKey) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._forget(sequence)

    def close_streams(self, keep: Callable[[StreamId], bool]) -> None:
        for sequence in [sequence for sequence in self._sequences.values() if not keep(sequence.opened.stream)]:
            self._forget(sequence)

    def _forget(self, sequence: StageSequence) -> None:
        del self._sequences[sequence.key]
        self._allocator.give_up(sequence)
        self._freed.append(sequence.key)

    # ---- steps

    def has_work(self, now: float = 0.0) -> bool:
        return self.work_at_s(now) <= now

    def work_at_s(self, now: float) -> float:
        """When there is something to plan, if nothing happens until then; infinite: not before something does."""
        if self._freed or any(sequence.waiting and self._allocator.may_give(sequence) for sequence in self._sequences.values()):
            return now
        return min((self.selection.begins_s(sequences, now) for sequences in self._ready_lanes().values()), default=math.inf)

    def _ready_lanes(self) -> dict[Lane, list[StageSequence]]:
        """All sequences of the lanes in which some could be computed."""
        sequences = defaultdict[Lane, list[StageSequence]](list)
        for sequence in self._sequences.values():
            sequences[sequence.lane].append(sequence)
        return {lane: there for lane, there in sequences.items() if any(sequence.ready > 0 for sequence in there)}

    def plan(self, now: float = 0.0) -> StepPlan:
        """The next step. Its blocks stay held until `commit`, whatever is closed meanwhile."""
        lost = self._drop_overdue(now)
        self._readmit()
        lane = self._next_lane(now)
        chunks: list[ScheduledChunk] = []
        if lane is not None:
            self._steps += 1
            for sequence, count in self._chosen(lane, now):
                if sequence.key in self._sequences and self._grow(sequence, sequence.computed + count + 1, lost):
                    chunks.append(chunk_of(sequence, count, self._stop_ids(sequence)))
            chunks = [
                chunk
                for chunk in chunks
                if self._sequences.get(chunk.sequence.key) is chunk.sequence and not chunk.sequence.waiting
            ]
            for chunk in chunks:
                chunk.sequence.served, chunk.sequence.planned_s = self._steps, now
                self._allocator.hold(chunk)
        freed, self._freed = tuple(self._freed), []
        gone = self._allocator.dropped_pages(), self._allocator.spilling_pages()
        return StepPlan(self._steps, lane if chunks else None, tuple(chunks), tuple(lost), freed, *gone)

    def _drop_overdue(self, now: float) -> list[SequenceLost]:
        """Their deadline has passed, so no step computes them."""
        overdue = [sequence for sequence in self._sequences.values() if sequence.deadline_at <= now]
        for sequence in overdue:
            self._overdue += 1
            self._forget(sequence)
        return [SequenceLost(sequence.key, "the request's deadline passed") for sequence in overdue]

    def _readmit(self) -> None:
        """Preempted sequences go on, the most important first, as soon as there is room for what they know."""
        for sequence in sorted((sequence for sequence in self._sequences.values() if sequence.waiting), key=_standing):
            if not self._allocator.give(sequence):
                return
            sequence.waiting = False

    def _next_lane(self, now: float) -> Lane | None:
        """The lane with work that was served longest ago; a new one counts as never served."""
        ready = {
            lane: sequences for lane, sequences in self._ready_lanes().items() if self.selection.begins_s(sequences, now) <= now
        }
        if not ready:
            return None
        lane = min(
            ready,
            key=lambda lane: (self._turns.get(lane, -1), min(sequence.age for sequence in ready[lane] if sequence.ready > 0)),
        )
        in_use = {sequence.lane for sequence in self._sequences.values()}
        self._turns = {kept: step for kept, step in self._turns.items() if kept in in_use} | {lane: self._steps + 1}
        return lane

    def _chosen(self, lane: Lane, now: float) -> list[tuple[StageSequence, int]]:
        """The sequences of the next step with their counts of positions, guesses among them."""
        chosen = self.selection.select(
            lane, (sequence for sequence in self._sequences.values() if sequence.lane == lane), self._steps, now
        )
        if lane.start > 0 or not self._allocator.spans[lane.span].exact:
            return chosen
        return self.selection.with_guesses(chosen, self._allocator.spare)

    def _grow(self, sequence: StageSequence, tokens: int, lost: list[SequenceLost]) -> bool:
        """Gives `row` room for `tokens`; while there is none the least of its span goes. False: that was `row` itself."""
        if sequence.waiting:
            return False
        while not self._allocator.grow(sequence, tokens):
            rivals = (other for other in self._sequences.values() if other.lane.span == sequence.lane.span and other.blocks)
            least = max(rivals, key=_standing)
            if least.opened.last_choice and least.first and least.last:
                self._preempt(least)
            else:
                self._evicted += 1
                self._forget(least)
                lost.append(SequenceLost(least.key, "evicted: no KV block was free, and it was the youngest sequence"))
            if least is sequence:
                return False
        return True

    def _preempt(self, sequence: StageSequence) -> None:
        """It waits here for blocks and begins anew; what pages hold of it by then it need not compute."""
        self._preempted += 1
        self._allocator.give_up(sequence)
        self._freed.append(sequence.key)
        sequence.waiting, sequence.computed, sequence.draft, sequence.guessed = True, 0, [], 0

    def commit(self, plan: StepPlan, drawn: Mapping[SequenceKey, Sequence[Drawn]]) -> list[TokenOut | SequenceLost]:
        """Takes the step's results up; nothing comes of sequences that were closed in mid-step."""
        outputs: list[TokenOut | SequenceLost] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if self._sequences.get(sequence.key) is not sequence:
                continue
            sequence.alone = False
            sequence.computed = int(min(chunk.position + chunk.count, sequence.void_from))
            sequence.pushed = [part for part in sequence.pushed if part.end > sequence.computed]
            sequence.names_sent += len(chunk.names)
            self._allocator.keep_pages(sequence)
            if chunk.draws:
                outputs += self._take_drawn(chunk, drawn[sequence.key])
        self._allocator.end_step()
        return outputs

    def pages_to_store(self) -> list[PageCopy]:
        """What the last commit wants kept; to be copied before the next plan."""
        return self._allocator.pages_to_store()

    def pages_lost(self, span: Span, numbers: Sequence[int], plan: StepPlan | None = None) -> list[SequenceLost]:
        """The content of pages could not be kept, or not be read by the step `plan`. Sequences that need it recompute it.

        Only a sequence whose path goes over other stages is lost here, for they count on it too; it may go anywhere.
        """
        if plan is not None:
            self._again(plan)
        sequences = [sequence for sequence in self._sequences.values() if sequence.lane.span == span]
        sequences = [sequence for sequence in sequences if not set(numbers).isdisjoint([*sequence.offered, *sequence.restoring])]
        alone = [sequence for sequence in sequences if sequence.first and sequence.last]
        for sequence in alone:
            self._cached_tokens -= sequence.cached
            sequence.cached = 0
            self._preempt(sequence)
        spread = [sequence for sequence in sequences if sequence not in alone]
        for sequence in spread:
            self._forget(sequence)
        for number in numbers:
            self._allocator.drop_page(span, number)
        return [SequenceLost(sequence.key, "a page it counted on was not kept") for sequence in spread]

    def _take_drawn(self, chunk: ScheduledChunk, drawn: Sequence[Drawn]) -> list[TokenOut | SequenceLost]:
        """One token, and one for each guess before it that was right."""
        sequence, outputs = chunk.sequence, list[TokenOut | SequenceLost]()
        for each in drawn:
            position, sampling = sequence.known, sequence.opened.sampling
            if each.token is None:
                self._failed += 1
                self._forget(sequence)
                reason = each.why_none or "the model gave no usable logits (not a number, or nothing left to draw)"
                return [*outputs, SequenceLost(sequence.key, reason, retryable=False)]
            finish = None
            late_enough = position - sequence.opened.prompt_tokens >= sampling.min_tokens
            if each.ends or (each.token in chunk.stop_ids and late_enough):
                finish = "stop"
            elif position + 1 >= sequence.limit:
                finish = "length"
            outputs.append(TokenOut(sequence.key, position, each.token, finish, each.logprob, each.top, sequence.cached))
            if finish is not None:
                self._finished += 1
                self._forget(sequence)
                return outputs
            was_true = sequence.confirm(each.token)
            self._true_guesses += was_true and sequence.first
            if not was_true:
                return outputs
        return outputs

    def _stop_ids(self, sequence: StageSequence) -> frozenset[int]:
        """Tokens that end this sequence; `ignore_eos` takes the model's own out, wherever they came from."""
        stops = frozenset(sequence.opened.sampling.stop_token_ids)
        return stops - self._allocator.spans[sequence.lane.span].end_ids if sequence.opened.sampling.ignore_eos else stops

    def out_of_memory(self, plan: StepPlan) -> list[SequenceLost]:
        """There was no memory for the step: its least important sequence is lost, the others are tried again."""
        sequences = self._again(plan)
        if not sequences:
            return []
        least = max(sequences, key=_standing)
        self._failed += 1
        self._forget(least)
        return [SequenceLost(least.key, "out of memory, and it was the youngest sequence of the step")]

    def fail(self, plan: StepPlan, reason: str) -> list[SequenceLost]:
        """The step failed. A sequence that was alone in it is lost; of several each is tried alone, and all others go on."""
        sequences = self._again(plan)
        if len(sequences) == 1 and len(plan.chunks) == 1:
            self._failed += 1
            self._forget(sequences[0])
            return [SequenceLost(sequences[0].key, reason)]
        self._isolated += 1
        for sequence in sequences:
            sequence.alone = True
        return []

    def _again(self, plan: StepPlan) -> list[StageSequence]:
        """Nothing came of the step: its sequences are as they were before it."""
        sequences = [chunk.sequence for chunk in plan.chunks if self._sequences.get(chunk.sequence.key) is chunk.sequence]
        for sequence in sequences:
            if sequence.first:
                sequence.draft, sequence.guessed = [], 0
        self._allocator.end_step()
        return sequences

    # ---- figures

    def load(self) -> Load:
        sequences = self._sequences.values()
        return Load(
            running=len(self._sequences),
            waiting=sum(sequence.computed == 0 for sequence in sequences),
            kv_blocks_used=self._allocator.used,
            kv_blocks_total=self._allocator.total,
            prefill_tokens_queued=sum(
                sequence.opened.known - sequence.computed
                for sequence in sequences
                if sequence.opened.known - sequence.computed > 1
            ),
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
            pages=self._allocator.pages,
            spilled_pages=self._allocator.spilled_pages,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            guessed_tokens=self.selection.guessed_tokens,
            true_guesses=self._true_guesses,
            preempted=self._preempted,
            overdue=self._overdue,
            isolated=self._isolated,
        )


def _standing(sequence: StageSequence) -> tuple[int, int]:
    """The sequence to evict is the greatest: the least important, and of those the youngest."""
    return sequence.opened.priority, sequence.age
