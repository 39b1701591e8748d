"""The scheduler under any order of calls, with the worker's view of pages: stored, spilled, restored and lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace

from mesh.errors import BadRequest, Refused
from mesh.prefix import PREFIX_PAGE_TOKENS, further_names
from mesh.view import Span
from node.engine.api import OpenSequence, Prefix, SequenceKey, SequenceLost, TokenOut
from node.engine.kv.blocks import BLOCK_TOKENS
from node.engine.kv.prefix_index import PageName
from node.engine.scheduling.scheduler import Scheduler
from node.engine.scheduling.sequence import DrawResult, ScheduledChunk, StepPlan
from tests.engine.test_scheduler import EARLY, LATE, WHOLE, held, push, sequence

pytestmark = pytest.mark.no_kernel

PROMPTS = [1, 30, 3 * PREFIX_PAGE_TOKENS + 4, 3 * PREFIX_PAGE_TOKENS + 4, BLOCK_TOKENS - 1, BLOCK_TOKENS + 5]
STEP_TOKENS = [600, 600, 40, 7, 1]


def drawn_for(chunk: ScheduledChunk) -> list[DrawResult]:
    """Draws a text that is mostly periodic, so that guesses are right and wrong."""
    drawn = []
    for position, guess in enumerate([*chunk.draft, None], chunk.draws_from):
        drawn.append(DrawResult(60 + position % 3 if position % 11 else 70))
        if drawn[-1].token != guess:
            break
    return drawn


@dataclass(frozen=True)
class SequenceSpec:
    """A sequence to be opened; prompts of the same `text` begin with the same tokens."""

    text: int
    prompt: int
    answer: int
    span: tuple[int, int]
    extra: int  # tokens of its answer that are known when it is opened
    priority: int
    last_choice: bool
    keeps_pages: bool
    remaining_s: int | None

    def sequence(self, name: str) -> OpenSequence:
        known = self.prompt + min(self.extra, self.answer - 1)
        tokens = tuple((number + 7 * self.text) % 90 + 5 for number in range(known))
        one = sequence(name, self.prompt, self.span, known=known, max_tokens=self.answer)
        return replace(
            one,
            tokens=tokens if one.tokens else (),
            prefix=Prefix(b"", tuple(further_names(b"", [], tokens)), "n") if self.keeps_pages else None,
            priority=self.priority,
            last_choice=self.last_choice,
            remaining_ms=None if self.remaining_s is None else self.remaining_s * 1000,
        )


SPECS = st.builds(
    SequenceSpec,
    text=st.sampled_from([0, 0, 0, 1]),
    prompt=st.sampled_from(PROMPTS),
    answer=st.sampled_from([1, 2, 5, 8, 60]),
    span=st.sampled_from([(0, 4), (0, 4), (0, 4), (0, 2), (1, 3), (2, 4), (2, 4)]),
    extra=st.integers(0, 3),
    priority=st.integers(-1, 1),
    last_choice=st.booleans(),
    keeps_pages=st.sampled_from([True, True, True, True, False]),
    remaining_s=st.sampled_from([None, None, None, 3]),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Opens, feeds, closes, computes, spills and loses in any order; see the invariants."""

    reached: ClassVar[Counter[str]] = Counter()  # how often all examples reached a situation

    @initialize(
        step_tokens=st.sampled_from(STEP_TOKENS),
        blocks=st.sampled_from([2, 3, 4, 1]),
        max_spilled=st.sampled_from([40, 3, 0]),
        prompt=st.sampled_from([3 * PREFIX_PAGE_TOKENS + 4, 3 * PREFIX_PAGE_TOKENS + 4, BLOCK_TOKENS - 1]),
        span=st.sampled_from([(0, 4), (0, 4), (2, 4)]),
        crowd=st.sampled_from([30, BLOCK_TOKENS - 1]),
        last_choice=st.booleans(),
        spills=st.sampled_from([True, True, False]),
    )
    def make(
        self,
        step_tokens: int,
        blocks: int,
        max_spilled: int,
        prompt: int,
        span: tuple[int, int],
        crowd: int,
        last_choice: bool,
        spills: bool,
    ) -> None:
        """Begins where pages were kept, were evicted, and are to be restored: random rules rarely reach this state."""
        self.pools = {span: held(blocks) for span in (WHOLE, EARLY, LATE)}
        self.scheduler = Scheduler(step_tokens, 4, growth_tokens=0)  # so that blocks run out, and sequences are evicted
        for loaded, one in self.pools.items():
            self.scheduler.add_span(loaded, one)
        self.opened: dict[SequenceKey, OpenSequence] = {}
        self.specs: dict[SequenceKey, SequenceSpec] = {}
        self.ended: set[SequenceKey] = set()
        self.next_position: dict[SequenceKey, int] = {}
        self.running: StepPlan | None = None
        self.content: dict[tuple[Span, int], PageName] = {}  # the pages whose content a worker would hold
        self.spilled: set[tuple[Span, int]] = set()  # those of `content` that are spilled
        self.damaged: set[tuple[Span, int]] = set()  # those that cannot be read any more; the scheduler has not been told
        self.now = 0.0
        self.spill_up_to(max_spilled)
        spec = SequenceSpec(0, prompt, 1, span, 0, 0, last_choice, True, None)
        self.open(spec)
        push(self.scheduler, "s0", 0, prompt)
        self.steps(150, True)
        self.crowd(crowd, last_choice)
        self.steps(3, spills)
        self.end_step("commit", True)  # a step under way would hold the blocks that are needed next
        self.close_all()
        self.open(spec)

    @rule(spec=SPECS)
    def open(self, spec: SequenceSpec) -> None:
        one = spec.sequence(f"s{len(self.opened)}")
        try:
            self.scheduler.open(one, self.now)
        except (Refused, BadRequest):
            return
        self.opened[one.key] = one
        self.specs[one.key] = spec
        self.next_position[one.key] = one.known

    @rule(pick=st.integers(0, 99), count=st.integers(1, 120), at=st.sampled_from(["next", "offered", "again", "late"]))
    def feed(self, pick: int, count: int, at: str) -> None:
        keys = [one for one, opened in self.opened.items() if opened.start > 0]
        if keys:
            one = keys[pick % len(keys)]
            state = self.scheduler._sequences.get(one)
            end, offered = (state.pushed_end, len(state.offered_pages) * PREFIX_PAGE_TOKENS) if state is not None else (0, 0)
            push(self.scheduler, one.stream, {"next": end, "offered": end or offered, "again": 0, "late": end + 7}[at], count)

    @rule(pick=st.integers(0, 99), off=st.integers(-1, 1))
    def token(self, pick: int, off: int) -> None:
        if self.opened:
            one = list(self.opened)[pick % len(self.opened)]
            state = self.scheduler._sequences.get(one)
            self.scheduler.token(one, (state.known if state else 0) + off, 60)

    @rule(pick=st.integers(0, 99))
    def close(self, pick: int) -> None:
        if self.opened:
            self.close_one(list(self.opened)[pick % len(self.opened)])

    def close_one(self, one: SequenceKey) -> None:
        self.scheduler.close(one)
        self.ended.add(one)

    @rule(prompt=st.sampled_from([30, BLOCK_TOKENS - 1]), last_choice=st.booleans())
    def crowd(self, prompt: int, last_choice: bool) -> None:
        """Opens as many sequences as there is room for; long ones soon need more blocks."""
        for _ in range(self.scheduler.max_sequences):
            self.open(SequenceSpec(1, prompt, 60, (0, 4), 0, 0, last_choice, False, None))

    @rule()
    def close_all(self) -> None:
        for one in list(self.scheduler._sequences):
            self.close_one(one)

    @rule(pick=st.integers(0, 99))
    def open_again(self, pick: int) -> None:
        if self.opened:
            self.open(list(self.specs.values())[pick % len(self.specs)])

    @rule(limit=st.sampled_from([0, 3, 40]))
    def spill_up_to(self, limit: int) -> None:
        self.scheduler.allocator.apply_limits(dict.fromkeys(self.pools, limit))

    @rule(pick=st.integers(0, 99))
    def damage(self, pick: int) -> None:
        """Damages a spilled page; the step that reads it detects the damage."""
        if self.spilled:
            self.damaged.add(sorted(self.spilled, key=str)[pick % len(self.spilled)])

    @rule(spills=st.sampled_from([True, True, False]))
    def begin_step(self, spills: bool) -> None:
        if self.running is not None:
            return
        self.now += 1
        self.running = plan = self.scheduler.plan(self.now)
        self.check_outputs(plan.lost)
        assert sum(chunk.count for chunk in plan.chunks) <= self.scheduler.selection.step_tokens
        assert len({chunk.sequence.lane for chunk in plan.chunks}) <= 1
        for page in plan.dropped_pages:
            self.forget_page(page)
        for chunk in plan.chunks:
            assert chunk.sequence.key not in self.ended
            assert len(chunk.sequence.blocks) * BLOCK_TOKENS >= chunk.position + chunk.count
            pages = [self.content[chunk.sequence.lane.span, number] for number in chunk.restore_pages]
            assert pages == [chunk.sequence.page_name(page) for page in range(len(pages))], "not the pages of its first tokens"
            assert not pages or chunk.position == len(pages) * PREFIX_PAGE_TOKENS
            self.reached["restored"] += len(pages)
            self.reached["restored from spill"] += sum(
                (chunk.sequence.lane.span, number) in self.spilled for number in chunk.restore_pages
            )
        for page in plan.pages_to_spill:
            if spills and page in self.content:
                self.spilled.add(page)
            else:
                self.lose(page[0], [page[1]])
        self.reached["spilled"] += len(plan.pages_to_spill)

    @rule(end=st.sampled_from(["commit", "commit", "fail", "out of memory"]), stores=st.sampled_from([True, True, False]))
    def end_step(self, end: str, stores: bool) -> None:
        plan, self.running = self.running, None
        if plan is None:
            return
        for chunk in plan.chunks:
            pages = [(chunk.sequence.lane.span, number) for number in chunk.restore_pages]
            if missing := [page for page in pages if page in self.damaged or page not in self.content]:
                self.reached["lost while pinned"] += 1
                self.lose(chunk.sequence.lane.span, [number for _, number in missing], plan)
                return
        if end == "fail":
            self.check_outputs(self.scheduler.fail(plan, "broken"))
        elif end == "out of memory":
            self.check_outputs(self.scheduler.out_of_memory(plan))
        else:
            drawing = {chunk.sequence.key: drawn_for(chunk) for chunk in plan.chunks if chunk.draws}
            self.check_outputs(self.scheduler.commit(plan, drawing))
        states = {chunk.sequence.key: chunk.sequence for chunk in plan.chunks}
        for store in self.scheduler.allocator.take_page_copies():
            if stores:
                self.content[store.lane.span, store.number] = states[store.key].page_name(store.position // PREFIX_PAGE_TOKENS)
            else:
                self.lose(store.lane.span, [store.number])

    @rule(count=st.sampled_from([1, 3, 20]), spills=st.booleans())
    def steps(self, count: int, spills: bool) -> None:
        """Runs steps as a worker does when no other call arrives."""
        for _ in range(count):
            self.end_step("commit", True)
            if not self.scheduler.has_work(self.now + 1):
                break
            self.begin_step(spills)

    def lose(self, span: Span, numbers: Sequence[int], plan: StepPlan | None = None) -> None:
        for number in numbers:
            self.forget_page((span, number))
        self.check_outputs(self.scheduler.pages_lost(span, numbers, plan))

    def forget_page(self, page: tuple[Span, int]) -> None:
        self.content.pop(page, None)
        self.spilled.discard(page)
        self.damaged.discard(page)

    def check_outputs(self, outputs: Iterable[TokenOut | SequenceLost]) -> None:
        for out in outputs:
            assert out.key not in self.ended, "output of a sequence that has ended"
            if isinstance(out, SequenceLost):
                self.ended.add(out.key)
                continue
            assert out.position == self.next_position[out.key], "a duplicate token, or a gap"
            self.next_position[out.key] += 1
            limit = self.opened[out.key].prompt_tokens + self.opened[out.key].sampling.max_tokens
            assert (out.finish == "length") == (out.position == limit - 1)
            if out.finish:
                self.ended.add(out.key)

    @invariant()
    def blocks_and_pages_are_those_of_sequences_and_the_running_step(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for span, one in self.pools.items():
            states = [state for state in self.scheduler._sequences.values() if state.lane.span == span]
            blocks = {block for state in states for block in state.blocks}
            for pool, more in self.scheduler.allocator._held_by_step:
                blocks |= set(more) if pool is one.pool else set()
            pages = self.scheduler.allocator._indexes[span]
            assert one.pool.used == len(blocks) + pages.blocks <= one.pool.total
            assert pages.readers == sum(len(state.offered_pages) + len(state.restoring_pages) for state in states)
            assert all((span, number) in self.content for number in pages._names), "the index has a page without content"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.end_step("commit", True)
        while (work_at_s := self.scheduler.work_at_s(self.now)) < float("inf"):
            self.now = max(self.now, work_at_s)  # progress: each plan computes, frees or loses something
            self.begin_step(True)
            plan = self.running
            assert plan is not None and (plan.chunks or plan.freed or plan.lost)
            before, known = self.progress(plan)
            self.end_step("commit", True)
            assert not plan.chunks or self.progress(plan) != (before, known)
        self.reached["preempted"] += self.scheduler.statistics().preempted
        self.scheduler.close_streams(lambda stream: False)
        assert self.scheduler.load().kv_blocks_used == 0 and self.scheduler.load().running == 0

    def progress(self, plan: StepPlan) -> tuple[int, int]:
        """Returns a value that every step changes; each lost page is detected only once."""
        return sum(chunk.sequence.computed for chunk in plan.chunks), len(self.ended) + sum(self.next_position.values())


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def test_the_state_machine_reaches_spilled_and_restored_pages() -> None:
    """Each example begins in this state; otherwise the machine would not test these pages."""
    SchedulerMachine.reached.clear()
    machine = SchedulerMachine()
    machine.make(600, 2, 40, 3 * PREFIX_PAGE_TOKENS + 4, (0, 4), 30, True, True)
    machine.steps(20, True)
    assert SchedulerMachine.reached["spilled"] >= SchedulerMachine.reached["restored from spill"] == 3
    machine.crowd(BLOCK_TOKENS - 1, True)
    machine.steps(20, True)
    machine.teardown()
    assert SchedulerMachine.reached["preempted"] > 0


def test_a_damaged_page_is_lost_when_a_step_restores_it() -> None:
    SchedulerMachine.reached.clear()
    machine = SchedulerMachine()
    machine.make(600, 2, 40, 3 * PREFIX_PAGE_TOKENS + 4, (0, 4), 30, True, True)
    machine.damage(0)
    machine.begin_step(True)
    machine.end_step("commit", True)
    machine.blocks_and_pages_are_those_of_sequences_and_the_running_step()
    assert SchedulerMachine.reached["lost while pinned"] == 1
    machine.teardown()


def test_pinned_spilled_pages_stay_when_other_pages_are_spilled() -> None:
    machine = SchedulerMachine()
    machine.make(600, 3, 3, 3 * PREFIX_PAGE_TOKENS + 4, (2, 4), 30, True, True)
    assert machine.scheduler.allocator._indexes[WHOLE].spilled == machine.scheduler.allocator._indexes[WHOLE].readers == 3
    machine.open(SequenceSpec(1, 3 * PREFIX_PAGE_TOKENS + 4, 1, (0, 4), 0, 0, True, True, None))
    machine.steps(20, True)
    machine.crowd(30, True)
    machine.steps(3, True)
    machine.blocks_and_pages_are_those_of_sequences_and_the_running_step()
    machine.teardown()
