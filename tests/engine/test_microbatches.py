"""Microbatches of a split model: the number of groups that keeps the stages busy is found by measuring tokens a second."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, pairwise
from random import Random
from typing import Any

import pytest

from mesh.ids import ModelId, StreamId
from mesh.view import Span
from node.engine.api import HiddenOut, OpenSequence, SequenceLost, TokenOut
from node.engine.kv.blocks import BlockPool
from node.engine.scheduling.kv_allocator import HeldSpan
from node.engine.scheduling.microbatches import MAX_GROUPS, MAX_TRIAL_INTERVAL, GroupTuning, Microbatches
from node.engine.scheduling.scheduler import Scheduler
from node.engine.scheduling.sequence import DrawResult, StepPlan
from node.requests import SamplingParams

pytestmark = pytest.mark.no_kernel

MODEL = ModelId("toy")
LAYERS = 12
HIDDEN = 1
PROMPT = 8
SECONDS = 2.0

Cost = Callable[[int, int], float]
"""Seconds that a step of so many positions takes over so many layers."""


def by_memory(rows: int, layers: int) -> float:
    """The time to read the weights dominates, as for a few rows on a CPU."""
    return layers * (1e-3 + rows * 2e-5)


def by_arithmetic(rows: int, layers: int) -> float:
    """The time is nearly proportional to the rows."""
    return layers * (5e-5 + rows * 1e-4)


@dataclass
class Machine:
    """One core: it runs one step at a time."""

    free_s: float = 0.0

    def busy(self, now: float, took_s: float) -> float:
        self.free_s = max(self.free_s, now) + took_s
        return self.free_s


@dataclass
class Stage:
    scheduler: Scheduler
    start: int
    end: int
    core: Machine
    computing: StepPlan | None = None


@dataclass
class Path:
    """Stages in virtual time. A new sequence is opened when one ends, so that the load is constant."""

    cuts: list[int]
    cost: Cost
    hop_s: float = 1e-4
    one_core: bool = False
    answer: int = 200
    now: float = 0.0
    drawn: int = 0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order, self.names, core = count(), count(), Machine()
        self.answers: dict[str, list[int]] = {}
        self.stages = []
        bounds = [0, *self.cuts, LAYERS]
        for start, end in pairwise(bounds):
            scheduler = Scheduler(512, 64, speculates=False)
            held = HeldSpan(BlockPool(400), LAYERS, HIDDEN, 1000, 100_000, frozenset())
            scheduler.add_span(Span(MODEL, start, end), held)
            self.stages.append(Stage(scheduler, start, end, core if self.one_core else Machine()))

    def open(self, answer: int | None = None) -> None:
        name = f"s{next(self.names)}"
        self.answers[name] = []
        sampling = SamplingParams(max_tokens=answer or self.answer, seed=1)
        for stage in reversed(self.stages):
            tokens = tuple(range(PROMPT)) if stage.start == 0 or stage.end == LAYERS else ()
            sequence = OpenSequence(StreamId(name), 0, 1, MODEL, stage.start, stage.end, PROMPT, PROMPT, tokens, sampling)
            stage.scheduler.open(sequence, self.now)
        self._begin(self.stages[0])

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), what))

    def _begin(self, stage: Stage) -> None:
        if stage.computing is not None:
            return
        work_at_s = stage.scheduler.work_at_s(self.now)
        if self.now < work_at_s < float("inf"):
            self._at(work_at_s + 1e-6, lambda: self._begin(stage))
        elif work_at_s <= self.now:
            plan = stage.scheduler.plan(self.now)
            assert not plan.lost
            if plan.chunks:
                stage.computing = plan
                rows = sum(chunk.count for chunk in plan.chunks)
                ends_at = stage.core.busy(self.now, self.cost(rows, stage.end - stage.start))
                self._at(ends_at, lambda: self._end(stage))

    def _end(self, stage: Stage) -> None:
        plan, stage.computing = stage.computing, None
        assert plan is not None
        number = self.stages.index(stage)
        if stage.end < LAYERS:
            stage.scheduler.commit(plan, {})
            sent = [HiddenOut(p.sequence.key, p.position, p.count, b"\0" * 4 * HIDDEN * p.count) for p in plan.chunks]
            self._at(self.now + self.hop_s, lambda: self._arrive(self.stages[number + 1], sent))
        else:
            results = {p.sequence.key: [DrawResult(5 + (p.position * 7) % 900)] for p in plan.chunks if p.draws}
            outputs = stage.scheduler.commit(plan, results)
            self._at(self.now + self.hop_s, lambda: self._return(outputs))
        self._begin(stage)

    def _arrive(self, stage: Stage, sent: list[HiddenOut]) -> None:
        for hidden in sent:
            stage.scheduler.push(hidden)
        self._begin(stage)

    def _return(self, outputs: list[TokenOut | SequenceLost]) -> None:
        first = self.stages[0]
        for out in outputs:
            assert isinstance(out, TokenOut)
            self.drawn += 1
            self.answers[out.key.stream].append(out.position)
            if out.finish is None and len(self.stages) > 1:
                first.scheduler.token(out.key, out.position, out.token, self.now)
            elif out.finish is not None:
                for stage in self.stages:
                    stage.scheduler.close(out.key)
                self.open()
        self._begin(first)

    def run(self, sequences: int, seconds: float) -> float:
        """Returns the tokens a second over the second half of the time."""
        rng = Random(sequences)
        for _ in range(sequences):
            self.open(rng.randint(1, self.answer))  # different lengths, so that they do not end together
        half = 0
        while self.now < seconds:
            when, _, what = heapq.heappop(self.events)
            if self.now < seconds / 2 <= when:
                half = self.drawn
            self.now = when
            what()
        return (self.drawn - half) / (seconds / 2)


def rate(cuts: list[int], cost: Cost, seconds: float = SECONDS, **given: Any) -> float:
    return Path(cuts, cost, **given).run(24, seconds)


@pytest.mark.parametrize("cuts", [[6], [4, 8]])
def test_stages_on_different_machines_compute_at_the_same_time(cuts: list[int]) -> None:
    """The ideal throughput: the slowest stage never waits."""
    one = rate([], by_arithmetic)
    slowest = max(end - start for start, end in pairwise([0, *cuts, LAYERS]))
    assert rate(cuts, by_arithmetic) > 0.85 * one * LAYERS / slowest


def with_groups(groups: int, cuts: list[int], cost: Cost, **given: Any) -> float:
    """As `rate`, with a fixed number of groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupTuning, "groups", groups)
        patch.setattr(GroupTuning, "window_measured", lambda *ignored: None)
        return rate(cuts, cost, **given)


def test_two_stages_on_one_core_settle_on_one_group() -> None:
    """Where stages cannot overlap, more groups only read the weights more often."""
    together, apart = (with_groups(groups, [6], by_memory, one_core=True) for groups in (1, 2))
    assert rate([6], by_memory, one_core=True, seconds=2 * SECONDS) > 0.9 * together > 1.2 * apart


def test_a_long_round_trip_leads_to_more_groups() -> None:
    fixed = [with_groups(groups, [6], by_arithmetic, hop_s=0.03) for groups in (1, 6)]
    assert rate([6], by_arithmetic, hop_s=0.03) > 0.85 * max(fixed) > fixed[0]


def test_waiting_briefly_merges_groups_that_have_split() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Microbatches, "wait_until_s", lambda self, ready, decoding, now_s: now_s)
        never_waiting = rate([6], by_memory)
    assert rate([6], by_memory) > 1.1 * never_waiting


def test_no_sequence_waits_forever_for_another_group() -> None:
    path = Path([4, 8], by_arithmetic, answer=40)
    path.run(17, seconds=2.0)
    for name, positions in path.answers.items():
        assert positions == list(range(PROMPT, PROMPT + len(positions))), name
    oldest = list(path.answers.values())[: len(path.answers) - 17]
    assert oldest and all(oldest), "every sequence but the last seventeen has ended"


def test_a_prompt_of_one_token_counts_as_decoding() -> None:
    scheduler = Scheduler(512, 64)
    scheduler.add_span(Span(MODEL, 0, 6), HeldSpan(BlockPool(4), LAYERS, HIDDEN, 1000, 1000, frozenset()))
    sampling = SamplingParams(max_tokens=5, seed=1)
    scheduler.open(OpenSequence(StreamId("short"), 0, 1, MODEL, 0, 6, 1, 1, (7,), sampling), 3.0)
    assert scheduler.work_at_s(3.0) == 3.0 and len(scheduler.plan(3.0).chunks) == 1
    assert Microbatches(stages=3).wait_until_s(1, 0, 3.0) == 3.0


def test_a_single_sequence_or_an_unsplit_model_has_no_groups() -> None:
    assert Microbatches(stages=3).group_size(1) == 1
    path = Path([], by_memory)
    path.open()
    path.open()
    path.now = path.events[0][0]
    heapq.heappop(path.events)[2]()
    assert path.stages[0].computing is not None and len(path.stages[0].computing.chunks) == 2


def test_trials_become_rare_without_gain_and_frequent_after_one() -> None:
    tuning, trials = GroupTuning(best=2), 0
    for _ in range(400):
        trials += tuning.trial > 0
        tuning.window_measured(100.0 if tuning.groups == 2 else 90.0, decoding=32)
    assert tuning.best == 2 and tuning.trial_interval == MAX_TRIAL_INTERVAL and 4 < trials < 16
    for _ in range(400):
        tuning.window_measured(40.0 * tuning.groups, decoding=32)
    assert tuning.best == MAX_GROUPS
    for _ in range(600):
        tuning.window_measured(40.0 * tuning.groups, decoding=3)
        assert tuning.trial <= 3, "there are at most as many groups as sequences"
