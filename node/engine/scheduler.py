"""Which rows the next step computes. A core: no torch, no clock, no threads.

Each (loaded span, layers asked of it) is a *lane*; a step takes rows of one lane, and lanes with work take turns. Within a
step's token budget decodes go first, those not served for longest ahead; a quarter of the budget stays for prefill
while any waits, the oldest sequence first, so neither starves the other. Any mixture gives the same tokens (design.md,
Exactness), so fairness is free.

A sequence holds blocks for the tokens known when it was admitted and takes more as it grows. When none is free the
youngest sequence of that span is evicted: the oldest always finishes, so there is no livelock, and recomputing
elsewhere changes no token.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.errors import LocalError, Refused
from mesh.ids import StreamId
from mesh.prefix import NAME_BYTES, PAGE_TOKENS
from mesh.view import Load, Span
from node.engine.admission import check
from node.engine.api import HiddenOut, OpenSequence, SequenceKey, SequenceLost, TokenOut
from node.engine.blocks import BlockPool, blocks_for
from node.engine.pages import PageIndex
from node.engine.rows import Drawn, HeldSpan, Lane, PageStore, Piece, Pushed, Row, SchedulerStatistics, StepPlan
from node.engine.sharing import share


class Scheduler:
    """Every method takes microseconds. The caller holds a lock around each; a step runs between `plan` and `commit`."""

    def __init__(self, step_tokens: int, max_sequences: int) -> None:
        if step_tokens < 1 or max_sequences < 1:
            raise LocalError(f"expected a positive token budget and sequence limit, got {step_tokens} and {max_sequences}")
        self.step_tokens = step_tokens
        self.max_sequences = max_sequences
        self._spans: dict[Span, HeldSpan] = {}
        self._rows: dict[SequenceKey, Row] = {}
        self._turns: dict[Lane, int] = {}  # number of the step that served the lane last
        self._held_by_step: list[tuple[BlockPool, list[int]]] = []
        self._pages: dict[Span, PageIndex] = {}
        self._stores: list[PageStore] = []
        self._prompt_tokens = self._cached_tokens = 0
        self._freed: list[SequenceKey] = []
        self._steps = self._opened = self._finished = self._evicted = self._failed = self._dropped = 0

    # ---- spans

    def add_span(self, span: Span, held: HeldSpan) -> None:
        """Serves `span` from now on; a span that is there already stays as it is."""
        if span not in self._spans:
            self._spans[span] = held
            self._pages[span] = PageIndex(held.pool)

    def drop_span(self, span: Span) -> list[SequenceLost]:
        """Forgets a span; its sequences are lost, and may go elsewhere."""
        rows = [row for row in self._rows.values() if row.lane.span == span]
        for row in rows:
            self._forget(row)
        self._spans.pop(span, None)
        self._pages.pop(span, None)
        return [SequenceLost(row.key, f"layers {span.start}:{span.end} of {span.model} were unloaded") for row in rows]

    def fit_pages(self) -> None:
        """The pools have other sizes now."""
        for pages in self._pages.values():
            pages.fit()

    # ---- sequences

    def open(self, sequence: OpenSequence) -> int:
        """As `Engine.open`; a sequence that is open already stays as it is."""
        if sequence.key in self._rows:
            self._dropped += 1
            return 0
        span, held = self._span_for(sequence)
        check(sequence, held)
        if sum(row.lane.span == span for row in self._rows.values()) >= self.max_sequences:
            raise Refused(f"{self.max_sequences} sequences are running on layers {span.start}:{span.end} of {span.model}")
        row = Row(
            sequence,
            Lane(span, sequence.start, sequence.end),
            held.layers,
            held.hidden_size,
            self._opened + 1,
            [],
            list(sequence.tokens),
            sequence.known,
            served=self._steps,
            names=list(sequence.prefix.names) if sequence.prefix is not None else [],
        )
        row.names_sent = len(row.names)
        if not self._give_room(row):
            free = held.pool.free + self._pages[span].blocks
            raise Refused(f"no room for {sequence.known} tokens: {free} of {held.pool.total} KV blocks are free")
        self._opened += 1
        self._rows[sequence.key] = row
        return len(row.offered) + len(row.restoring)

    def _give_room(self, row: Row) -> bool:
        """Blocks for the tokens known so far, and the pages that hold their beginning; False: there is no room."""
        pages, prefix = self._pages[row.lane.span], row.opened.prefix
        names = [row.page_name(page) for page in range(min(len(row.names), (row.known - 1) // PAGE_TOKENS))]
        pages.find(names)  # those it wants are now the last to go
        blocks = pages.take(blocks_for(row.known + 1))
        if blocks is None:
            return False
        row.blocks = blocks
        found = pages.find(names)
        if row.first and prefix is not None:
            found = found if prefix.elsewhere is None else found[: prefix.elsewhere]
        pages.pin(found)
        row.offered = found
        if row.first:
            self._begin(row, len(found) * PAGE_TOKENS)
            self._prompt_tokens += row.known
            self._cached_tokens += row.computed
        return True

    def _begin(self, row: Row, position: int) -> None:
        """It computes from `position` on, and takes what is before from the pages it was offered."""
        count = position // PAGE_TOKENS
        self._pages[row.lane.span].unpin(row.offered[count:])
        row.restoring, row.offered = row.offered[:count], []
        row.computed = row.pushed_end = row.cached = position
        row.pages_kept = count

    def _span_for(self, sequence: OpenSequence) -> tuple[Span, HeldSpan]:
        fitting = [
            (span, held)
            for span, held in self._spans.items()
            if span.model == sequence.model and span.start <= sequence.start < sequence.end <= span.end
        ]
        if not fitting:
            raise LocalError(f"no loaded span holds layers {sequence.start}:{sequence.end} of {sequence.model}")
        return max(fitting, key=lambda pair: (pair[1].pool.free, -pair[0].start, -pair[0].end))

    def push(self, hidden: HiddenOut) -> None:
        """Takes activations that continue what came before; all else is counted and dropped."""
        row = self._rows.get(hidden.key)
        if row is None or not _continues(row, hidden):
            self._dropped += 1
            return
        position, count = hidden.position, hidden.count
        if position and row.pushed_end == 0:
            self._begin(row, position)
        row.pushed.append(Pushed(position, count, hidden.data))
        row.pushed_end += count
        row.names += hidden.names

    def token(self, key: SequenceKey, position: int, token: int) -> None:
        """The token at `position`, for a first stage that is not also the last; all else is counted and dropped."""
        row = self._rows.get(key)
        if row is None or not row.first or row.last or position != row.known or row.known + 1 >= row.limit:
            self._dropped += 1
            return
        if not 0 <= token < self._spans[row.lane.span].vocab_size:
            self._dropped += 1
            return
        row.tokens.append(token)
        row.known += 1

    def close(self, key: SequenceKey) -> None:
        row = self._rows.get(key)
        if row is not None:
            self._forget(row)

    def close_streams(self, keep: Callable[[StreamId], bool]) -> None:
        for row in [row for row in self._rows.values() if not keep(row.opened.stream)]:
            self._forget(row)

    def _forget(self, row: Row) -> None:
        del self._rows[row.key]
        self._give_up_room(row)

    def _give_up_room(self, row: Row) -> None:
        self._pages[row.lane.span].unpin([*row.offered, *row.restoring])
        self._spans[row.lane.span].pool.release(row.blocks)
        row.blocks, row.offered, row.restoring = [], [], []
        self._freed.append(row.key)

    # ---- steps

    def has_work(self) -> bool:
        return bool(self._freed) or any(row.ready > 0 for row in self._rows.values())

    def plan(self) -> StepPlan:
        """The next step. Its blocks stay held until `commit`, whatever is closed meanwhile."""
        lost: list[SequenceLost] = []
        lane = self._next_lane()
        pieces: list[Piece] = []
        if lane is not None:
            self._steps += 1
            ready = [row for row in self._rows.values() if row.lane == lane and row.ready > 0]
            for row, count in share(ready, self.step_tokens):
                if row.key in self._rows and self._grow(row, row.computed + count + 1, lost):
                    pieces.append(self._piece(row, count))
            pieces = [piece for piece in pieces if self._rows.get(piece.row.key) is piece.row]
            pool = self._spans[lane.span].pool
            for piece in pieces:
                piece.row.served = self._steps
                pool.retain(piece.row.blocks)
                self._held_by_step.append((pool, list(piece.row.blocks)))
        freed, self._freed = tuple(self._freed), []
        dropped = tuple((span, number) for span, pages in self._pages.items() for number in pages.dropped())
        return StepPlan(self._steps, lane if pieces else None, tuple(pieces), tuple(lost), freed, dropped)

    def _next_lane(self) -> Lane | None:
        """The lane with work that was served longest ago; a new one counts as never served."""
        ready: dict[Lane, int] = {}
        for row in self._rows.values():
            if row.ready > 0:
                ready[row.lane] = min(row.age, ready.get(row.lane, row.age))
        if not ready:
            return None
        lane = min(ready, key=lambda lane: (self._turns.get(lane, -1), ready[lane]))
        in_use = {row.lane for row in self._rows.values()}
        self._turns = {kept: step for kept, step in self._turns.items() if kept in in_use} | {lane: self._steps + 1}
        return lane

    def _grow(self, row: Row, tokens: int, lost: list[SequenceLost]) -> bool:
        """Gives `row` room for `tokens`, evicting the youngest of its span while there is none; False: that was `row` itself."""
        pages = self._pages[row.lane.span]
        missing = blocks_for(min(tokens, row.limit)) - len(row.blocks)
        while missing > 0:
            more = pages.take(missing)
            if more is not None:
                row.blocks += more
                return True
            youngest = max(
                (other for other in self._rows.values() if other.lane.span == row.lane.span), key=lambda other: other.age
            )
            self._evicted += 1
            self._forget(youngest)
            lost.append(SequenceLost(youngest.key, "evicted: no KV block was free, and it was the youngest sequence"))
            if youngest is row:
                return False
        return True

    def _piece(self, row: Row, count: int) -> Piece:
        position, end = row.computed, row.computed + count
        draws = row.last and end == row.known
        sampling = row.opened.sampling
        looks_back = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
        looks_back = looks_back or sampling.grammar is not None
        row.learn_names()
        return Piece(
            row,
            position,
            count,
            tokens=tuple(row.tokens[position:end]) if row.first else (),
            pushed=() if row.first else tuple(part for part in row.pushed if part.position < end),
            restore=tuple(row.restoring),
            names=() if row.last else tuple(row.names[row.names_sent :]),
            draws=draws,
            history=tuple(row.tokens) if draws and looks_back else (),
            stop_ids=self._stop_ids(row) if draws else frozenset(),
        )

    def commit(self, plan: StepPlan, drawn: dict[SequenceKey, Drawn]) -> list[TokenOut | SequenceLost]:
        """Takes the step's results up; nothing comes of sequences that were closed in mid-step."""
        outputs: list[TokenOut | SequenceLost] = []
        for piece in plan.pieces:
            row = piece.row
            if self._rows.get(row.key) is not row:
                continue
            row.computed = piece.position + piece.count
            row.pushed = [part for part in row.pushed if part.position + part.count > row.computed]
            row.names_sent += len(piece.names)
            self._pages[row.lane.span].unpin(row.restoring)
            row.restoring = []
            self._keep_pages(row)
            if piece.draws:
                outputs.append(self._draw(piece, drawn[row.key]))
        self._end_step()
        return outputs

    def _keep_pages(self, row: Row) -> None:
        """Has the pages kept that have become whole, as long as there is room."""
        pages = self._pages[row.lane.span]
        row.learn_names()
        while row.pages_kept < min(len(row.names), row.settled // PAGE_TOKENS):
            name = row.page_name(row.pages_kept)
            number = pages.add(name)
            if number is not None:
                self._stores.append(PageStore(row.key, row.lane, row.pages_kept * PAGE_TOKENS, number))
            elif name not in pages:
                return
            row.pages_kept += 1

    def pages_to_store(self) -> list[PageStore]:
        """What the last commit wants kept; to be copied before the next plan."""
        stores, self._stores = self._stores, []
        return stores

    def not_stored(self, store: PageStore) -> list[SequenceLost]:
        """There was no memory for a copy; who already counted on the page may go elsewhere."""
        lane, number = store.lane, store.number
        waiting = [row for row in self._rows.values() if row.lane == lane and number in (*row.offered, *row.restoring)]
        for row in waiting:
            self._forget(row)
        if lane.span in self._pages:
            self._pages[lane.span].drop(number)
        return [SequenceLost(row.key, "a page it counted on was not kept, for lack of memory") for row in waiting]

    def _draw(self, piece: Piece, drawn: Drawn) -> TokenOut | SequenceLost:
        row = piece.row
        position, sampling = row.known, row.opened.sampling
        if drawn.token is None:
            self._failed += 1
            self._forget(row)
            reason = drawn.why_none or "the model gave no usable logits (not a number, or nothing left to draw)"
            return SequenceLost(row.key, reason, retryable=False)
        finish = None
        late_enough = position - row.opened.prompt_tokens >= sampling.min_tokens
        if drawn.ends or (drawn.token in piece.stop_ids and late_enough):
            finish = "stop"
        elif position + 1 >= row.limit:
            finish = "length"
        row.tokens.append(drawn.token)
        row.known += 1
        if finish is not None:
            self._finished += 1
            self._forget(row)
        return TokenOut(row.key, position, drawn.token, finish, drawn.logprob, drawn.top, row.cached)

    def _stop_ids(self, row: Row) -> frozenset[int]:
        """Tokens that end this sequence; `ignore_eos` takes the model's own out, wherever they came from."""
        stops = frozenset(row.opened.sampling.stop_token_ids)
        return stops - self._spans[row.lane.span].end_ids if row.opened.sampling.ignore_eos else stops

    def fail(self, plan: StepPlan, reason: str) -> list[SequenceLost]:
        """The step failed: its sequences are lost, all others go on."""
        lost = []
        for row in (piece.row for piece in plan.pieces):
            if self._rows.get(row.key) is row:
                self._failed += 1
                self._forget(row)
                lost.append(SequenceLost(row.key, reason))
        self._end_step()
        return lost

    def _end_step(self) -> None:
        for pool, blocks in self._held_by_step:
            pool.release(blocks)
        self._held_by_step = []

    # ---- figures

    def load(self) -> Load:
        rows = self._rows.values()
        pools = [held.pool for held in self._spans.values()]
        return Load(
            running=len(self._rows),
            waiting=sum(row.computed == 0 for row in rows),
            kv_blocks_used=sum(pool.used for pool in pools) - sum(pages.blocks for pages in self._pages.values()),
            kv_blocks_total=sum(pool.total for pool in pools),
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
            pages=sum(map(len, self._pages.values())),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
        )


def _continues(row: Row, hidden: HiddenOut) -> bool:
    """Whether a peer's activations are what this row waits for, in place, size and type."""
    position, count = hidden.position, hidden.count
    if row.first or count < 1 or position + count >= row.limit or (row.last and position + count > row.known):
        return False
    begins = row.pushed_end == 0 and position % PAGE_TOKENS == 0 and position <= len(row.offered) * PAGE_TOKENS
    if position != row.pushed_end and not begins:
        return False
    if len(hidden.data) not in (2 * count * row.hidden_size, 4 * count * row.hidden_size):
        return False
    named = len(row.names) + len(hidden.names)
    return not hidden.names or (
        row.opened.prefix is not None
        and named * PAGE_TOKENS <= position + count
        and all(len(name) == NAME_BYTES for name in hidden.names)
    )
