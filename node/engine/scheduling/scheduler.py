"""Schedules steps: admits sequences, plans which positions the next step computes, and applies its results. No torch.

This is a core: it reads no clock and starts no thread. Each pair of a loaded span and the layers requested of it is a *lane*; a
step computes sequences of one lane, and lanes that have work take turns. Within a lane `step_selection` splits the token budget
of the step. Any mixture gives the same tokens (`docs/architecture.md`), so every order is allowed; for the same reason a step may
compute guessed tokens (`speculation`), and a sequence may start behind pages that other sequences computed (`prefix_index`).

A sequence is admitted with blocks for its known tokens and takes more as it grows. When no block is free, the least important
sequence of that span, and of those the youngest, gives up its blocks: the most important sequence always finishes, so there is
no livelock. A sequence that gave up its blocks is lost here, and its entry continues it elsewhere; where no other node could
continue it, it waits here and is computed again before any new sequence is admitted. A step that fails is tried again sequence
by sequence, so that only a sequence that fails alone is lost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mesh.errors import BadRequest, LocalError, Refused
from mesh.ids import ModelId, StreamId
from mesh.prefix import NAME_BYTES, PREFIX_PAGE_TOKENS
from mesh.view import Load, Span
from node.engine.api import HiddenOut, Lane, OpenSequence, SequenceKey, SequenceLost, TokenOut
from node.engine.kv.blocks import blocks_for
from node.engine.scheduling.kv_allocator import HeldSpan, KvAllocator
from node.engine.scheduling.sequence import DrawResult, ScheduledChunk, StageSequence, StepPlan
from node.engine.scheduling.step_selection import StepSelection

GROWTH_TOKENS = 256  # for which each running sequence has blocks kept free: no newcomer is admitted into these


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
    dropped: int  # pushes, tokens and opens that were duplicates, too early or too late
    pages: int = 0
    spilled_pages: int = 0  # those of `pages` that are spilled
    prompt_tokens: int = 0  # of all sequences that a first stage admitted
    cached_tokens: int = 0  # those of `prompt_tokens` that were restored from pages
    guessed_tokens: int = 0  # by first stages
    true_guesses: int = 0
    preempted: int = 0  # sequences that gave up their blocks and waited here for others
    overdue: int = 0  # sequences whose deadline passed
    isolated: int = 0  # steps that failed and were tried again sequence by sequence


class Scheduler:
    """Every method takes microseconds. The caller holds a lock around each; a step runs between `plan` and `commit`.

    `allocator`: the memory of the loaded spans; the caller uses it under the same lock, for pages and their limits.
    `now_s`: seconds of any clock that never goes back.
    """

    def __init__(self, step_tokens: int, max_sequences: int, speculates: bool = True, growth_tokens: int = GROWTH_TOKENS) -> None:
        if step_tokens < 1 or max_sequences < 1:
            raise LocalError(f"expected a positive token budget and sequence limit, got {step_tokens} and {max_sequences}")
        self.max_sequences = max_sequences
        self.growth_tokens = growth_tokens
        self.selection = StepSelection(step_tokens, speculates)
        self.allocator = KvAllocator()
        self._sequences: dict[SequenceKey, StageSequence] = {}
        self._lane_steps: dict[Lane, int] = {}  # number of the step that computed the lane last
        self._freed: list[SequenceKey] = []
        self._steps = self._opened = self._finished = self._evicted = self._failed = self._dropped = 0
        self._prompt_tokens = self._cached_tokens = self._true_guesses = 0
        self._preempted = self._overdue = self._isolated = 0

    # ---- spans

    def add_span(self, span: Span, held: HeldSpan) -> None:
        """Serves `span` from now on; no effect if the span is served already."""
        self.allocator.add_span(span, held)

    def drop_span(self, span: Span) -> list[SequenceLost]:
        """Forgets a span; its sequences are lost, and may continue elsewhere."""
        lost = [sequence for sequence in self._sequences.values() if sequence.lane.span == span]
        for sequence in lost:
            self._forget(sequence)
        self.allocator.drop_span(span)
        self.selection.forget_span(span)
        reason = f"layers {span.start}:{span.end} of {span.model} were unloaded"
        return [SequenceLost(sequence.key, reason) for sequence in lost]

    # ---- sequences

    def open(self, request: OpenSequence, now_s: float = 0.0) -> int:
        """As `Engine.open`; no effect if the sequence is open already."""
        if request.key in self._sequences:
            self._dropped += 1
            return 0
        span = self.allocator.span_for(request)
        held = self.allocator.spans[span]
        _require_servable(request, held)
        others = [sequence for sequence in self._sequences.values() if sequence.lane.span == span]
        if len(others) >= self.max_sequences:
            raise Refused(f"{self.max_sequences} sequences are running on layers {span.start}:{span.end} of {span.model}")
        page_names = list(request.prefix.names) if request.prefix is not None else []
        sequence = StageSequence(
            request,
            Lane(span, request.start, request.end),
            model_layers=held.layers,
            hidden_size=held.hidden_size,
            number=self._opened + 1,
            tokens=list(request.tokens),
            known=request.known,
            admitted_step=self._steps,
            served_step=self._steps,
            page_names=page_names,
            page_names_sent=len(page_names),  # the entry sent them to every stage
        )
        if request.remaining_ms is not None:
            sequence.deadline_s = now_s + request.remaining_ms / 1e3
        # Preempted sequences come first: a newcomer would take the blocks for which they wait.
        free = self.allocator.free_blocks(span)
        fits = free - self._reserved_blocks(others) >= blocks_for(request.known + 1) or not others
        if not fits or any(other.preempted for other in others) or not self.allocator.allocate(sequence):
            raise Refused(f"no room for {request.known} tokens: {free} of {held.pool.total} KV blocks are free")
        assert sequence.blocks
        sequence.cached_tokens = sequence.computed
        if sequence.on_first_stage:
            self._prompt_tokens += sequence.known
            self._cached_tokens += sequence.cached_tokens
        self._opened += 1
        self._sequences[request.key] = sequence
        return len(sequence.offered_pages) + len(sequence.restoring_pages)

    def push(self, hidden: HiddenOut) -> None:
        """Appends activations that continue an open sequence; counts and drops all others."""
        sequence = self._sequences.get(hidden.key)
        if sequence is None or not sequence.accepts(hidden):
            self._dropped += 1
            return
        # The position of its first activations shows a later stage how many pages the whole path restores.
        if hidden.position and sequence.pushed_end == 0:
            self.allocator.start_at(sequence, hidden.position)
            sequence.cached_tokens = hidden.position
        sequence.append_activations(hidden)

    def token(self, key: SequenceKey, position: int, token: int, now_s: float = 0.0) -> None:
        """Takes the token drawn for `position`, on a first stage that is not also the last; counts and drops all others."""
        sequence = self._sequences.get(key)
        if sequence is None or not sequence.on_first_stage or sequence.on_last_stage:
            self._dropped += 1
            return
        vocab_size = self.allocator.spans[sequence.lane.span].vocab_size
        if position != sequence.known or sequence.known + 1 >= sequence.end_position or not 0 <= token < vocab_size:
            self._dropped += 1
            return
        self._true_guesses += sequence.confirm_token(token)
        self.selection.token_returned(sequence, now_s)

    def close(self, key: SequenceKey) -> None:
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._forget(sequence)

    def close_streams(self, keep: Callable[[StreamId], bool]) -> None:
        for sequence in [sequence for sequence in self._sequences.values() if not keep(sequence.request.stream)]:
            self._forget(sequence)

    def _forget(self, sequence: StageSequence) -> None:
        del self._sequences[sequence.key]
        self.allocator.release(sequence)
        self._freed.append(sequence.key)

    # ---- planning a step

    def has_work(self, now_s: float = 0.0) -> bool:
        return self.work_at_s(now_s) <= now_s

    def work_at_s(self, now_s: float) -> float:
        """Returns when there is something to plan, if nothing happens until then; infinite: not before something happens."""
        if self._freed or any(each.preempted and self.allocator.may_allocate(each) for each in self._sequences.values()):
            return now_s
        lanes = self._ready_lanes().values()
        return min((self.selection.earliest_begin_s(sequences, now_s) for sequences in lanes), default=math.inf)

    def _ready_lanes(self) -> dict[Lane, list[StageSequence]]:
        """Returns all sequences of each lane in which at least one sequence is ready."""
        lanes = defaultdict[Lane, list[StageSequence]](list)
        for sequence in self._sequences.values():
            lanes[sequence.lane].append(sequence)
        return {lane: sequences for lane, sequences in lanes.items() if any(each.ready > 0 for each in sequences)}

    def plan(self, now_s: float = 0.0) -> StepPlan:
        """Returns the next step. Its blocks stay allocated until `commit`, even if sequences are closed meanwhile."""
        lost = self._drop_overdue(now_s)
        self._readmit()
        lane = self._next_lane(now_s)
        chunks: list[ScheduledChunk] = []
        if lane is not None:
            self._steps += 1
            for sequence, count in self._select(lane, now_s):
                # Growing an earlier sequence may have evicted this one.
                still_open = sequence.key in self._sequences
                if still_open and self._grow_or_evict(sequence, sequence.computed + count + 1, lost):
                    chunks.append(sequence.next_chunk(count, self._stop_ids(sequence)))
            # Growing a later sequence may have evicted or preempted one that already had its chunk.
            chunks = [
                chunk
                for chunk in chunks
                if self._sequences.get(chunk.sequence.key) is chunk.sequence and not chunk.sequence.preempted
            ]
            for chunk in chunks:
                chunk.sequence.served_step, chunk.sequence.planned_at_s = self._steps, now_s
                self.allocator.hold_for_step(chunk)
        assert sum(chunk.count for chunk in chunks) <= self.selection.step_tokens
        freed, self._freed = tuple(self._freed), []
        return StepPlan(
            self._steps,
            lane if chunks else None,
            tuple(chunks),
            tuple(lost),
            freed,
            dropped_pages=self.allocator.take_dropped_pages(),
            pages_to_spill=self.allocator.take_pages_to_spill(),
        )

    def _drop_overdue(self, now_s: float) -> list[SequenceLost]:
        """Forgets sequences whose deadline passed: no client waits for their tokens."""
        overdue = [sequence for sequence in self._sequences.values() if sequence.deadline_s <= now_s]
        for sequence in overdue:
            self._overdue += 1
            self._forget(sequence)
        return [SequenceLost(sequence.key, "the request's deadline passed") for sequence in overdue]

    def _readmit(self) -> None:
        """Allocates blocks for preempted sequences, the most important first, until one finds too few blocks."""
        for sequence in sorted((each for each in self._sequences.values() if each.preempted), key=_eviction_order):
            if not self.allocator.allocate(sequence):
                return
            sequence.preempted = False

    def _next_lane(self, now_s: float) -> Lane | None:
        """Returns the lane with work that was computed longest ago; a new lane counts as never computed."""
        ready = {
            lane: sequences
            for lane, sequences in self._ready_lanes().items()
            if self.selection.earliest_begin_s(sequences, now_s) <= now_s
        }
        if not ready:
            return None

        def turn(lane: Lane) -> tuple[int, int]:
            return self._lane_steps.get(lane, -1), min(each.number for each in ready[lane] if each.ready > 0)

        lane = min(ready, key=turn)
        in_use = {sequence.lane for sequence in self._sequences.values()}
        self._lane_steps = {each: step for each, step in self._lane_steps.items() if each in in_use} | {lane: self._steps + 1}
        return lane

    def _select(self, lane: Lane, now_s: float) -> list[tuple[StageSequence, int]]:
        """Returns the sequences of the next step with their counts of positions, guesses included."""
        sequences = (sequence for sequence in self._sequences.values() if sequence.lane == lane)
        selected = self.selection.select(lane, sequences, self._steps, now_s)
        if lane.start > 0 or not self.allocator.spans[lane.span].exact:
            return selected
        return self.selection.add_drafts(selected, self.allocator.spare_tokens)

    def _grow_or_evict(self, sequence: StageSequence, tokens: int, lost: list[SequenceLost]) -> bool:
        """Allocates blocks for `tokens`, evicting the least important sequences of the span. False: `sequence` was evicted."""
        if sequence.preempted:
            return False
        while not self.allocator.grow(sequence, tokens):
            span = sequence.lane.span
            holders = (other for other in self._sequences.values() if other.lane.span == span and other.blocks)
            least = max(holders, key=_eviction_order)
            # The other stages of a split path have computed on, so only a sequence that is whole here can start again.
            if least.request.last_choice and least.on_first_stage and least.on_last_stage:
                self._preempt(least)
            else:
                self._evicted += 1
                self._forget(least)
                reason = "evicted: no KV block was free, and it was the youngest sequence"
                lost.append(SequenceLost(least.key, reason, no_room=True))
            if least is sequence:
                return False
        return True

    def _preempt(self, sequence: StageSequence) -> None:
        """Takes a sequence's blocks; it waits here and is computed again, except for what pages hold of it by then."""
        assert sequence.on_first_stage and sequence.on_last_stage
        self._preempted += 1
        self.allocator.release(sequence)
        self._freed.append(sequence.key)
        sequence.preempted, sequence.computed, sequence.draft, sequence.draft_length = True, 0, [], 0

    def _stop_ids(self, sequence: StageSequence) -> frozenset[int]:
        """Returns the tokens that end a sequence; `ignore_eos` removes the model's own, even where the request names them."""
        stops = frozenset(sequence.request.sampling.stop_token_ids)
        if sequence.request.sampling.ignore_eos:
            return stops - self.allocator.spans[sequence.lane.span].end_ids
        return stops

    # ---- the result of a step

    def commit(self, plan: StepPlan, drawn: Mapping[SequenceKey, Sequence[DrawResult]]) -> list[TokenOut | SequenceLost]:
        """Applies the results of a step; those of sequences that were closed meanwhile are discarded."""
        outputs: list[TokenOut | SequenceLost] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if self._sequences.get(sequence.key) is not sequence:
                continue
            assert sequence.computed == chunk.position or sequence.rewinds > chunk.rewinds
            sequence.isolated = False
            # Activations that arrived during the step may have voided the guesses that it computed.
            sequence.computed = int(min(chunk.position + chunk.count, sequence.void_from))
            sequence.pushed = [part for part in sequence.pushed if part.end > sequence.computed]
            sequence.page_names_sent += len(chunk.page_names)
            self.allocator.keep_pages(sequence)
            assert not sequence.restoring_pages
            if chunk.draws:
                outputs += self._apply_drawn(chunk, drawn[sequence.key])
        self.allocator.release_step()
        return outputs

    def _apply_drawn(self, chunk: ScheduledChunk, drawn: Sequence[DrawResult]) -> list[TokenOut | SequenceLost]:
        """Appends the drawn tokens: the next token, and one more behind each right guess."""
        assert 1 <= len(drawn) <= len(chunk.draft) + 1
        sequence, outputs = chunk.sequence, list[TokenOut | SequenceLost]()
        for result in drawn:
            position, sampling = sequence.known, sequence.request.sampling
            if result.token is None:
                self._failed += 1
                self._forget(sequence)
                reason = result.why_none or "the model gave no usable logits (not a number, or nothing left to draw)"
                return [*outputs, SequenceLost(sequence.key, reason, retryable=False)]
            finish = None
            may_stop = position - sequence.request.prompt_tokens >= sampling.min_tokens
            if result.ends or (result.token in chunk.stop_ids and may_stop):
                finish = "stop"
            elif position + 1 >= sequence.end_position:
                finish = "length"
            cached = sequence.cached_tokens
            outputs.append(TokenOut(sequence.key, position, result.token, finish, result.logprob, result.top, cached))
            if finish is not None:
                self._finished += 1
                self._forget(sequence)
                return outputs
            guessed_right = sequence.confirm_token(result.token)
            self._true_guesses += guessed_right and sequence.on_first_stage
            if not guessed_right:
                return outputs
        return outputs

    def pages_lost(self, span: Span, numbers: Sequence[int], plan: StepPlan | None = None) -> list[SequenceLost]:
        """Drops pages whose content could not be stored, or not be read by the step `plan`; their readers compute it again.

        Returns the readers that are lost: those whose path has other stages, which start behind the same pages. They may
        continue on any path.
        """
        if plan is not None:
            self._roll_back(plan)
        gone = set(numbers)
        readers = [
            sequence
            for sequence in self._sequences.values()
            if sequence.lane.span == span and not gone.isdisjoint([*sequence.offered_pages, *sequence.restoring_pages])
        ]
        whole = [sequence for sequence in readers if sequence.on_first_stage and sequence.on_last_stage]
        for sequence in whole:
            self._cached_tokens -= sequence.cached_tokens
            sequence.cached_tokens = 0
            self._preempt(sequence)
        split = [sequence for sequence in readers if sequence not in whole]
        for sequence in split:
            self._forget(sequence)
        for number in numbers:
            self.allocator.drop_page(span, number)
        return [SequenceLost(sequence.key, "a page it counted on was not kept") for sequence in split]

    def out_of_memory(self, plan: StepPlan) -> list[SequenceLost]:
        """Loses the least important sequence of a step for which there was no memory; the others are tried again."""
        sequences = self._roll_back(plan)
        if not sequences:
            return []
        least = max(sequences, key=_eviction_order)
        self._failed += 1
        self._forget(least)
        return [SequenceLost(least.key, "out of memory, and it was the youngest sequence of the step")]

    def fail(self, plan: StepPlan, reason: str) -> list[SequenceLost]:
        """Handles a failed step: its only sequence is lost; of several each is tried again alone."""
        sequences = self._roll_back(plan)
        if len(sequences) == 1 and len(plan.chunks) == 1:
            self._failed += 1
            self._forget(sequences[0])
            return [SequenceLost(sequences[0].key, reason)]
        self._isolated += 1
        for sequence in sequences:
            sequence.isolated = True
        return []

    def _roll_back(self, plan: StepPlan) -> list[StageSequence]:
        """Releases a step without result and returns its sequences that are still open, in the state before the step."""
        sequences = [chunk.sequence for chunk in plan.chunks if self._sequences.get(chunk.sequence.key) is chunk.sequence]
        for sequence in sequences:
            if sequence.on_first_stage:  # guesses of other stages are part of the activations that they pushed
                sequence.draft, sequence.draft_length = [], 0
        self.allocator.release_step()
        return sequences

    # ---- figures

    def room(self, model: ModelId) -> int:
        """Returns how many more sequences could be opened now on the spans of a model, if each were as long as the usual one."""
        return sum(self._room(span) for span in self.allocator.spans if span.model == model)

    def _room(self, span: Span) -> int:
        running = [sequence for sequence in self._sequences.values() if sequence.lane.span == span]
        if any(sequence.preempted for sequence in running):
            return 0
        usual = max(1, math.ceil(sum(len(sequence.blocks) for sequence in running) / len(running))) if running else 1
        free = self.allocator.free_blocks(span) - self._reserved_blocks(running)
        return max(0, min(self.max_sequences - len(running), free // usual))

    def _reserved_blocks(self, running: Sequence[StageSequence]) -> int:
        """Returns the blocks that running sequences are going to need soon, and do not hold yet."""
        ends = (min(each.end_position, each.known + self.growth_tokens) for each in running)
        return sum(max(0, blocks_for(end) - len(each.blocks)) for each, end in zip(running, ends, strict=True))

    def load(self) -> Load:
        sequences = self._sequences.values()
        prefills = (sequence.request.known - sequence.computed for sequence in sequences)
        return Load(
            running=len(sequences),
            waiting=sum(sequence.computed == 0 for sequence in sequences),
            kv_blocks_used=self.allocator.used_blocks,
            kv_blocks_total=self.allocator.total_blocks,
            prefill_tokens_queued=sum(tokens for tokens in prefills if tokens > 1),
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
            pages=self.allocator.pages,
            spilled_pages=self.allocator.spilled_pages,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            guessed_tokens=self.selection.guessed_tokens,
            true_guesses=self._true_guesses,
            preempted=self._preempted,
            overdue=self._overdue,
            isolated=self._isolated,
        )


def _eviction_order(sequence: StageSequence) -> tuple[int, int]:
    """The sequence with the greatest value is evicted first: the least important, and of those the youngest."""
    return sequence.request.priority, sequence.number


def _require_servable(request: OpenSequence, held: HeldSpan) -> None:
    """Raises BadRequest: the span can never serve the sequence, or the request contradicts itself."""
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
        if len(request.tokens) != request.known:
            raise BadRequest(f"expected all {request.known} known tokens at the first and last stage, got {len(request.tokens)}")
        worst = max(request.tokens, key=lambda token: token if token >= 0 else held.vocab_size - token)
        if not 0 <= worst < held.vocab_size:
            raise BadRequest(f"token {worst} is outside the vocabulary of {held.vocab_size}", param="prompt")
    if request.prefix is not None:
        whole_pages = request.known // PREFIX_PAGE_TOKENS
        names = request.prefix.names
        if len(names) != whole_pages or any(len(name) != NAME_BYTES for name in names):
            raise BadRequest(f"expected {whole_pages} names of {NAME_BYTES} bytes for the pages of {request.known} tokens")
