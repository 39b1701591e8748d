"""Speculation: where guesses come from, when they pay, and that no order of events puts a wrong guess into an answer."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from mesh.ids import ModelId, StreamId
from mesh.view import Span
from node.engine.api import HiddenOut, OpenSequence, SequenceLost, TokenOut
from node.engine.kv.blocks import BlockPool
from node.engine.scheduling.kv_allocator import HeldSpan
from node.engine.scheduling.scheduler import Scheduler
from node.engine.scheduling.sequence import DrawResult, ScheduledChunk, StepPlan
from node.engine.scheduling.speculation import FIRST_GUESS, MAX_GUESS, MAX_PAUSE_STEPS, DraftLength, NgramLookup, StepCosts
from node.requests import SamplingParams

pytestmark = pytest.mark.no_kernel

MODEL = ModelId("toy")
LAYERS, HIDDEN = 6, 4
PROMPT, ANSWER = 9, 60


def test_the_tokens_that_followed_the_last_three_before_are_guessed() -> None:
    lookup = NgramLookup()
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3]
    assert lookup.guess(text, 2) == (4, 5)
    assert lookup.guess([*text, 8, 1, 2, 3], 4) == (8, 1, 2, 3), "the latest occurrence counts"
    assert lookup.guess([*text, 8, 1, 2, 3, 6], 4) == ()
    assert NgramLookup().guess([1, 2], 4) == () == NgramLookup().guess([1, 2, 3, 1, 2, 3], 0)


def test_a_periodic_text_is_continued_periodically() -> None:
    assert NgramLookup().guess([7, 7, 7, 7], 5) == (7,) * 5
    assert NgramLookup().guess([5, 1, 2, 1, 2, 1], 5) == (2, 1, 2, 1, 2)


def test_guesses_grow_while_right_and_pause_longer_while_wrong() -> None:
    draft_length = DraftLength()
    lengths = []
    for _ in range(4):
        lengths.append(draft_length.next_length())
        draft_length.verified(lengths[-1], lengths[-1])
    assert lengths == [FIRST_GUESS, 7, MAX_GUESS, MAX_GUESS]
    draft_length.verified(MAX_GUESS, 4)
    assert draft_length.next_length() == 7
    pauses = []
    for _ in range(12):
        draft_length.verified(3, 0)
        pause = 0
        while draft_length.next_length() == 0:
            pause += 1
        pauses.append(pause)
    assert pauses == sorted(pauses) and pauses[0] < 4 and pauses[-1] == MAX_PAUSE_STEPS
    assert draft_length.rate < 0.1


def test_guesses_are_added_only_if_they_bring_more_tokens_a_millisecond() -> None:
    costs = StepCosts()
    assert costs.pays(1, 1, 7, 3.5), "a size that was never measured is tried"
    costs.measured(1, 10.0)
    costs.measured(8, 15.0)
    costs.measured(32, 40.0)
    costs.measured(512, 640.0)
    assert costs.pays(1, 1, 7, 3.5) and not costs.pays(1, 1, 7, 0.4)
    assert not costs.pays(32, 32, 32 * 15, 32 * 12)
    for _ in range(50):
        costs.measured(8, 60.0)
    assert not costs.pays(1, 1, 7, 3.5), "costs follow the measurements"


def truth(seed: int) -> list[int]:
    """Returns a text that copies from itself in places."""
    rng = Random(seed)
    text: list[int] = []
    while len(text) < PROMPT + ANSWER:
        if len(text) > 6 and rng.random() < 0.7:
            at, count = rng.randrange(len(text) - 4), rng.randrange(3, 14)
            text += text[at : at + count]
        else:
            text += [rng.randrange(3, 9) for _ in range(rng.randrange(1, 5))]
    return text[: PROMPT + ANSWER]


def packed(tokens: list[int]) -> bytes:
    return b"".join(struct.pack("<I12x", token) for token in tokens)


def unpacked(chunk: ScheduledChunk) -> list[int]:
    """Returns the tokens from which a chunk's activations were computed; selects rows as the worker does."""
    tokens: list[int] = []
    for part in chunk.pushed:
        pushed_tokens = [number for (number,) in struct.iter_unpack("<I12x", part.data)]
        tokens += pushed_tokens[max(chunk.position - part.position, 0) : chunk.position + chunk.count - part.position]
    return tokens


@dataclass
class StageOfTokens:
    """A stage whose keys are the tokens themselves, so that a wrong token is detected."""

    start: int
    end: int
    text: list[int]
    step_tokens: int
    keys: dict[int, int] = field(default_factory=dict)
    under_way: StepPlan | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.step_tokens, 4)
        span = Span(MODEL, self.start, self.end)
        self.scheduler.add_span(span, HeldSpan(BlockPool(4), LAYERS, HIDDEN, 100, 4096, frozenset()))
        self.sequence = OpenSequence(
            StreamId("s"),
            0,
            1,
            MODEL,
            self.start,
            self.end,
            PROMPT,
            PROMPT,
            tuple(self.text[:PROMPT]) if self.start == 0 or self.end == LAYERS else (),
            SamplingParams(max_tokens=ANSWER),
        )
        self.scheduler.open(self.sequence)

    def begin(self) -> None:
        if self.under_way is None and self.scheduler.has_work():
            self.under_way = self.scheduler.plan()

    def finish(self) -> list[HiddenOut | TokenOut | SequenceLost]:
        plan, self.under_way = self.under_way, None
        if plan is None or not plan.chunks:
            return []
        self.steps += 1
        [chunk] = plan.chunks
        tokens = list(chunk.tokens) if self.start == 0 else unpacked(chunk)
        assert len(tokens) == chunk.count
        self.keys.update(zip(range(chunk.position, chunk.position + chunk.count), tokens))
        outputs: list[Any] = []
        drawn = {}
        if self.end < LAYERS:
            names, draft = chunk.page_names, chunk.draft
            outputs.append(
                HiddenOut(chunk.sequence.key, chunk.position, chunk.count, packed(tokens), names, draft, chunk.rewinds)
            )
        elif chunk.draws:
            drawn[chunk.sequence.key] = self.draw(chunk)
        return outputs + list(self.scheduler.commit(plan, drawn))

    def draw(self, chunk: ScheduledChunk) -> list[DrawResult]:
        drawn: list[DrawResult] = []
        for position, guess in enumerate([*chunk.draft, None], chunk.draws_from):
            seen = [self.keys[at] for at in range(position)]
            assert seen == self.text[:position], f"the token at {position} was drawn behind other tokens"
            drawn.append(DrawResult(self.text[position]))
            if drawn[-1].token != guess:
                break
        return drawn


def run_path(seed: int, splits: list[int]) -> tuple[list[int], list[StageOfTokens]]:
    """Runs an answer over a path of stages split at `splits`; links keep their order, all other events come in any order."""
    rng = Random(seed)
    text = truth(seed)
    bounds = [0, *splits, LAYERS]
    stages = [StageOfTokens(start, end, text, rng.choice([2, 3, 5, 40]) if start else 40) for start, end in pairwise(bounds)]
    links: list[deque[Any]] = [deque() for _ in stages]  # links[i] leads out of stage i; the last leads back to the first stage
    drawn: list[int] = []
    for _ in range(20_000):
        act = rng.randrange(3)
        number = rng.randrange(len(stages))
        if act == 0:
            stages[number].begin()
        elif act == 1:
            links[number] += stages[number].finish()
        elif links[number]:
            out = links[number].popleft()
            if isinstance(out, HiddenOut):
                stages[number + 1].scheduler.push(out)
                continue
            assert isinstance(out, TokenOut), out
            drawn.append(out.token)
            if out.finish is not None:
                return drawn, stages
            if len(stages) > 1:
                stages[0].scheduler.token(out.key, out.position, out.token)
    raise AssertionError(f"seed {seed}: no end after {len(drawn)} tokens")


@pytest.mark.parametrize("splits", [[], [3], [2, 4], [1, 2, 5]])
def test_no_order_of_events_puts_a_wrong_guess_into_an_answer(splits: list[int]) -> None:
    true_guesses = wrong_guesses = 0
    for seed in range(60):
        drawn, stages = run_path(seed, splits)
        assert drawn == truth(seed)[PROMPT:], f"seed {seed}"
        statistics = stages[0].scheduler.statistics()
        true_guesses += statistics.true_guesses
        wrong_guesses += statistics.guessed_tokens - statistics.true_guesses
        assert all(stage.scheduler.statistics().dropped == 0 or stage.start for stage in stages)
    assert true_guesses > 60 * ANSWER / 5 and wrong_guesses > 60, "the text must give right and wrong guesses"


def test_a_sequence_alone_takes_fewer_steps_for_a_text_that_copies() -> None:
    text = [3, 4, 5, 6, 7, 8, 3, 4, 5] + [3 + (index % 6) for index in range(3, 3 + ANSWER)]
    stage = StageOfTokens(0, LAYERS, text, 40)
    drawn: list[int] = []
    while len(drawn) < ANSWER:
        stage.begin()
        plan, stage.under_way = stage.under_way, None
        assert plan is not None
        stage.steps += 1
        [chunk] = plan.chunks
        stage.keys.update(zip(range(chunk.position, chunk.position + chunk.count), chunk.tokens))
        drawn += [
            out.token
            for out in stage.scheduler.commit(plan, {chunk.sequence.key: stage.draw(chunk)})
            if isinstance(out, TokenOut)
        ]
    assert drawn == text[PROMPT:] and stage.steps <= 8


def test_guesses_stay_within_the_blocks_and_before_the_last_token() -> None:
    stage = StageOfTokens(0, LAYERS, [5] * (PROMPT + ANSWER), 400)
    widest = 0
    for _ in range(40):
        plan = stage.scheduler.plan()
        if not plan.chunks:
            break
        [chunk] = plan.chunks
        widest = max(widest, chunk.count)
        assert chunk.position + chunk.count <= PROMPT + ANSWER - 1
        stage.keys.update(zip(range(chunk.position, chunk.position + chunk.count), chunk.tokens))
        outputs = stage.scheduler.commit(plan, {chunk.sequence.key: stage.draw(chunk)})
    assert isinstance(outputs[-1], TokenOut) and outputs[-1].finish == "length"
    assert widest == 1 + MAX_GUESS
