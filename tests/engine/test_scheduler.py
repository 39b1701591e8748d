"""The scheduler: what a step computes and in which order; no block leaks and no sequence starves."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from mesh.errors import BadRequest, LocalError, Refused
from mesh.ids import ModelId, StreamId
from mesh.view import Span
from node.engine.api import HiddenOut, Lane, OpenSequence, SequenceKey, SequenceLost, TokenOut
from node.engine.kv.blocks import BLOCK_TOKENS, BlockPool
from node.engine.scheduling.kv_allocator import HeldSpan
from node.engine.scheduling.microbatches import Microbatches
from node.engine.scheduling.scheduler import Scheduler
from node.engine.scheduling.sequence import DrawResult, StepPlan
from node.engine.scheduling.step_selection import AGEING_STEPS
from node.requests import SamplingParams

pytestmark = pytest.mark.no_kernel

MODEL = ModelId("toy")
WHOLE, EARLY, LATE = Span(MODEL, 0, 4), Span(MODEL, 0, 3), Span(MODEL, 1, 4)
HIDDEN = 8
EOS = 2


def held(blocks: int = 16) -> HeldSpan:
    return HeldSpan(BlockPool(blocks), 4, HIDDEN, vocab_size=100, max_model_len=4096, end_ids=frozenset([EOS]))


def scheduler_of(*spans: Span, step_tokens: int = 64, max_sequences: int = 8, blocks: int = 16, growth: int = 256) -> Scheduler:
    scheduler = Scheduler(step_tokens, max_sequences, speculates=False, growth_tokens=growth)
    for span in spans or (WHOLE,):
        scheduler.add_span(span, held(blocks))
    return scheduler


def sequence(
    name: str = "a", prompt: int = 5, span: tuple[int, int] = (0, 4), known: int | None = None, **sampling: Any
) -> OpenSequence:
    known = prompt if known is None else known
    tokens = tuple(number % 90 + 5 for number in range(known)) if span[0] == 0 or span[1] == 4 else ()
    params = SamplingParams(**{"max_tokens": 4, **sampling})
    return OpenSequence(StreamId(name), 0, 1, MODEL, *span, prompt, known, tokens, params)


def run(scheduler: Scheduler, token: int | None = 50) -> tuple[StepPlan, list[TokenOut | SequenceLost]]:
    plan = scheduler.plan()
    outputs = scheduler.commit(plan, {chunk.sequence.key: [DrawResult(token)] for chunk in plan.chunks if chunk.draws})
    return plan, [*plan.lost, *outputs]


def key(name: str) -> SequenceKey:
    return SequenceKey(StreamId(name), 0, 1)


def shares(plan: StepPlan) -> dict[str, tuple[int, int]]:
    return {chunk.sequence.key.stream: (chunk.position, chunk.count) for chunk in plan.chunks}


def push(scheduler: Scheduler, name: str, position: int, count: int, size: int = 4) -> None:
    scheduler.push(HiddenOut(key(name), position, count, b"\0" * (count * HIDDEN * size)))


def test_a_sequence_prefills_decodes_to_its_length_and_frees_its_blocks() -> None:
    scheduler = scheduler_of()
    scheduler.open(sequence())
    plan, outputs = run(scheduler)
    assert shares(plan) == {"a": (0, 5)}
    assert outputs == [TokenOut(key("a"), 5, 50)]
    for position in (6, 7):
        plan, outputs = run(scheduler)
        assert shares(plan) == {"a": (position - 1, 1)}
        assert plan.chunks[0].tokens == (50,)
        assert outputs == [TokenOut(key("a"), position, 50)]
    assert run(scheduler)[1] == [TokenOut(key("a"), 8, 50, "length")]
    assert scheduler.load().kv_blocks_used == 0 and scheduler.load().running == 0
    assert run(scheduler)[0].freed == (key("a"),)
    assert not scheduler.has_work()


def test_a_long_prompt_is_split_and_only_its_last_chunk_draws() -> None:
    scheduler = scheduler_of(step_tokens=16)
    scheduler.open(sequence(prompt=40))
    seen = [run(scheduler) for _ in range(3)]
    assert [shares(plan)["a"] for plan, _ in seen] == [(0, 16), (16, 16), (32, 8)]
    assert [len(outputs) for _, outputs in seen] == [0, 0, 1]


def test_a_quarter_of_a_step_is_reserved_for_prefill() -> None:
    scheduler = scheduler_of(step_tokens=4, max_sequences=8)
    for name in "abcdef":
        scheduler.open(sequence(name, prompt=1, max_tokens=50))
    for _ in range(2):
        run(scheduler)
    scheduler.open(sequence("long", prompt=30))
    plan, _ = run(scheduler)
    assert shares(plan)["long"] == (0, 1)
    assert len(plan.chunks) == 4
    served = {name for _ in range(2) for name in shares(run(scheduler)[0])}
    assert served == {*"abcdef", "long"}, "decodes take turns when the budget is short"


def test_prefill_is_first_come_first_served() -> None:
    scheduler = scheduler_of(step_tokens=16)
    scheduler.open(sequence("old", prompt=24))
    scheduler.open(sequence("new", prompt=24))
    assert [shares(run(scheduler)[0]) for _ in range(2)] == [{"old": (0, 16)}, {"old": (16, 8), "new": (0, 8)}]


def test_lanes_take_turns_even_while_other_lanes_come_and_go() -> None:
    scheduler = scheduler_of(WHOLE, LATE, step_tokens=8)
    scheduler.open(sequence("steady", prompt=2000))
    for name in ("x", "y"):
        scheduler.open(sequence(name, prompt=100, span=(1 + (name == "y"), 4)))
    steady = 0
    for position in range(30):
        push(scheduler, "x", position, 1)
        push(scheduler, "y", position, 1)
        steady += "steady" in shares(run(scheduler)[0])
    assert steady == 10


def test_a_split_first_stage_waits_for_each_token() -> None:
    scheduler = scheduler_of(EARLY)
    scheduler.open(sequence(span=(0, 3)))
    plan, outputs = run(scheduler)
    assert shares(plan) == {"a": (0, 5)} and not plan.chunks[0].draws and outputs == []
    assert not scheduler.has_work()
    scheduler.token(key("a"), 5, 77)
    scheduler.token(key("a"), 5, 78)  # a duplicate
    scheduler.token(key("a"), 7, 79)  # too early
    scheduler.token(key("b"), 5, 77)  # unknown
    plan, _ = run(scheduler)
    assert shares(plan) == {"a": (5, 1)} and plan.chunks[0].tokens == (77,)
    assert scheduler.statistics().dropped == 3


def test_a_last_stage_draws_once_all_known_positions_were_received() -> None:
    scheduler = scheduler_of(LATE)
    scheduler.open(sequence(span=(1, 4), known=7))
    push(scheduler, "a", 0, 3)
    assert run(scheduler)[1] == []
    push(scheduler, "a", 0, 3)  # a duplicate
    push(scheduler, "a", 5, 2)  # a gap
    push(scheduler, "a", 3, 4, size=3)  # not whole rows in either type
    push(scheduler, "a", 3, 5)  # behind the known positions
    assert not scheduler.has_work()
    push(scheduler, "a", 3, 4, size=2)
    plan, outputs = run(scheduler)
    assert shares(plan) == {"a": (3, 4)} and outputs == [TokenOut(key("a"), 7, 50)]
    push(scheduler, "a", 7, 1)
    assert run(scheduler)[1] == [TokenOut(key("a"), 8, 50, "length")]
    assert scheduler.statistics().dropped == 4


def test_pushes_larger_than_the_budget_are_computed_in_chunks() -> None:
    scheduler = scheduler_of(LATE, step_tokens=4)
    scheduler.open(sequence(span=(1, 3), prompt=11))
    push(scheduler, "a", 0, 6)
    push(scheduler, "a", 6, 5)
    plans = [run(scheduler)[0] for _ in range(3)]
    assert [shares(plan)["a"] for plan in plans] == [(0, 4), (4, 4), (8, 3)]
    assert [[part.position for part in plan.chunks[0].pushed] for plan in plans] == [[0], [0, 6], [6]]


def test_stop_tokens_end_a_sequence_but_not_before_min_tokens() -> None:
    scheduler = scheduler_of()
    scheduler.open(sequence(max_tokens=9, min_tokens=1, stop_token_ids=(50,)))
    assert [run(scheduler)[1][0].finish for _ in range(2)] == [None, "stop"]  # type: ignore[union-attr]


def test_ignore_eos_ignores_only_the_models_own_end_tokens() -> None:
    scheduler = scheduler_of()
    scheduler.open(sequence(max_tokens=9, ignore_eos=True, stop_token_ids=(EOS, 50)))
    assert [run(scheduler, token)[1][0].finish for token in (EOS, 50)] == [None, "stop"]  # type: ignore[union-attr]


def test_a_resumed_sequence_counts_the_tokens_drawn_before() -> None:
    scheduler = scheduler_of()
    scheduler.open(sequence(prompt=5, known=8, max_tokens=4))
    assert run(scheduler)[1] == [TokenOut(key("a"), 8, 50, "length")]


def test_unusable_logits_end_one_sequence_without_retry_and_no_other() -> None:
    scheduler = scheduler_of()
    scheduler.open(sequence("bad"))
    scheduler.open(sequence("good"))
    plan = scheduler.plan()
    outputs = scheduler.commit(plan, {key("bad"): [DrawResult(None)], key("good"): [DrawResult(9)]})
    assert [(type(out), out.key.stream) for out in outputs] == [(SequenceLost, "bad"), (TokenOut, "good")]
    assert isinstance(outputs[0], SequenceLost) and not outputs[0].retryable


def test_blocks_that_running_sequences_will_need_soon_are_kept_for_them() -> None:
    scheduler = scheduler_of(blocks=3, step_tokens=1024)
    assert scheduler.room(MODEL) == 3
    scheduler.open(sequence("grows", prompt=BLOCK_TOKENS - 2, max_tokens=50))
    assert scheduler.room(MODEL) == 1
    scheduler.open(sequence("short", prompt=5, max_tokens=50))
    assert scheduler.room(MODEL) == 0
    with pytest.raises(Refused, match="no room"):
        scheduler.open(sequence("more", prompt=5, max_tokens=50))
    outputs = [out for _ in range(60) for out in run(scheduler)[1]]
    assert all(isinstance(out, TokenOut) for out in outputs) and scheduler.statistics().evicted == 0
    assert scheduler.room(MODEL) == 3


def test_a_sequence_alone_is_admitted_whatever_it_may_grow_to() -> None:
    scheduler = scheduler_of(blocks=1)
    scheduler.open(sequence("long", prompt=BLOCK_TOKENS - 2, max_tokens=1))
    assert scheduler.room(MODEL) == 0 and scheduler.room(ModelId("other")) == 0


def test_without_a_free_block_the_youngest_is_evicted_and_may_be_retried() -> None:
    scheduler = scheduler_of(blocks=2, step_tokens=1024, growth=0)
    scheduler.open(sequence("old", prompt=BLOCK_TOKENS - 2, max_tokens=50))
    scheduler.open(sequence("young", prompt=5, max_tokens=50))
    outputs = [out for _ in range(4) for out in run(scheduler)[1]]
    lost = [out for out in outputs if isinstance(out, SequenceLost)]
    assert [(out.key.stream, out.retryable) for out in lost] == [("young", True)]
    assert outputs[-1].key.stream == "old"
    assert scheduler.load().kv_blocks_used == 2


def test_a_sequence_evicted_while_its_step_is_planned_is_not_computed() -> None:
    scheduler = scheduler_of(EARLY, blocks=2, step_tokens=1024, growth=0)
    scheduler.open(sequence("old", prompt=BLOCK_TOKENS - 2, span=(0, 3), max_tokens=50))
    scheduler.open(sequence("young", prompt=5, span=(0, 3), max_tokens=50))
    run(scheduler)
    scheduler.token(key("old"), BLOCK_TOKENS - 2, 9)
    run(scheduler)
    scheduler.token(key("old"), BLOCK_TOKENS - 1, 9)  # needs a second block, but the other sequence is selected first
    scheduler.token(key("young"), 5, 9)
    scheduler.selection._groups[Lane(EARLY, 0, 3)] = Microbatches(stages=1)  # both in one step
    plan, outputs = run(scheduler)
    assert [out.key.stream for out in outputs] == ["young"]
    assert list(shares(plan)) == ["old"]


def test_blocks_of_a_sequence_closed_during_a_step_are_freed_after_it() -> None:
    scheduler = scheduler_of()
    scheduler.open(sequence())
    plan = scheduler.plan()
    scheduler.close(key("a"))
    assert scheduler.load().kv_blocks_used == 1
    assert scheduler.commit(plan, {key("a"): [DrawResult(50)]}) == []
    assert scheduler.load().kv_blocks_used == 0


def test_a_failed_step_loses_its_own_sequences_only() -> None:
    scheduler = scheduler_of(WHOLE, LATE)
    scheduler.open(sequence("here"))
    scheduler.open(sequence("there", span=(1, 4)))
    plan = scheduler.plan()
    assert [lost.key.stream for lost in scheduler.fail(plan, "it broke")] == ["here"]
    push(scheduler, "there", 0, 5)
    assert len(run(scheduler)[1]) == 1
    scheduler.close(key("there"))
    assert scheduler.load().kv_blocks_used == 0


def test_admission_distinguishes_no_room_now_from_never_servable() -> None:
    scheduler = scheduler_of(blocks=3, max_sequences=2)
    with pytest.raises(BadRequest, match="context of 4096"):
        scheduler.open(sequence("a", prompt=4000, max_tokens=97))
    with pytest.raises(BadRequest, match="need 4 KV blocks"):
        scheduler.open(sequence("a", prompt=3 * BLOCK_TOKENS))
    with pytest.raises(BadRequest, match="outside the vocabulary"):
        scheduler.open(OpenSequence(StreamId("a"), 0, 1, MODEL, 0, 4, 2, 2, (5, 100), SamplingParams()))
    with pytest.raises(BadRequest, match="all 2 known tokens"):
        scheduler.open(OpenSequence(StreamId("a"), 0, 1, MODEL, 0, 4, 2, 2, (5,), SamplingParams()))
    with pytest.raises(LocalError, match="no loaded span"):
        scheduler.open(OpenSequence(StreamId("a"), 0, 1, ModelId("other"), 0, 4, 2, 2, (5, 6), SamplingParams()))
    scheduler.open(sequence("a", prompt=BLOCK_TOKENS + 1))
    with pytest.raises(Refused, match="1 of 3 KV blocks"):
        scheduler.open(sequence("b", prompt=BLOCK_TOKENS + 1))
    scheduler.open(sequence("b"))
    with pytest.raises(Refused, match="2 sequences are running"):
        scheduler.open(sequence("c"))
    assert scheduler.load().running == 2


def test_dropping_a_span_or_closing_streams_frees_their_sequences() -> None:
    scheduler = scheduler_of(EARLY, LATE)
    scheduler.open(sequence("a", span=(0, 3)))
    scheduler.open(sequence("b", span=(1, 4)))
    scheduler.open(sequence("c", span=(0, 2)))
    assert [lost.key.stream for lost in scheduler.drop_span(LATE)] == ["b"]
    scheduler.close_streams(lambda stream: stream == "c")
    assert scheduler.load().running == 1
    assert set(scheduler.plan().freed) == {key("a"), key("b")}


def with_priority(request: OpenSequence, priority: int) -> OpenSequence:
    return replace(request, priority=priority)


def test_the_more_important_prefills_first_and_of_equals_the_older() -> None:
    scheduler = scheduler_of(step_tokens=16)
    scheduler.open(sequence("plain", prompt=16))
    scheduler.open(with_priority(sequence("idle", prompt=16), 5))
    scheduler.open(with_priority(sequence("urgent", prompt=16), -5))
    scheduler.open(with_priority(sequence("urgent too", prompt=16), -5))
    first = [next(iter(shares(plan))) for plan, _ in (run(scheduler) for _ in range(3))]
    assert first[0] == "urgent"
    order: list[str] = []
    for _ in range(12):
        order += [name for name, (position, _) in shares(run(scheduler)[0]).items() if position == 0]
    assert order[-1] == "idle"


def test_no_priority_starves_another_however_many_important_sequences_arrive() -> None:
    scheduler = scheduler_of(step_tokens=16, max_sequences=8)
    scheduler.open(with_priority(sequence("waiting", prompt=16), 2))
    for step in range((2 + 3) * AGEING_STEPS + 4):
        scheduler.open(with_priority(sequence(f"newer{step}", prompt=16, max_tokens=1), -3))
        if "waiting" in shares(run(scheduler)[0]):
            break
    else:
        pytest.fail("the sequence was never computed")
    assert step > AGEING_STEPS, "its priority counts for a while"


def test_the_least_important_is_evicted_even_if_another_is_younger() -> None:
    scheduler = scheduler_of(blocks=2, step_tokens=1024)
    scheduler.open(with_priority(sequence("idle", prompt=5, max_tokens=50), 1))
    scheduler.open(with_priority(sequence("growing", prompt=BLOCK_TOKENS - 2, max_tokens=50), 0))
    outputs = [out for _ in range(4) for out in run(scheduler)[1]]
    assert [out.key.stream for out in outputs if isinstance(out, SequenceLost)] == ["idle"]


def test_a_sequence_past_its_deadline_is_not_computed() -> None:
    scheduler = scheduler_of()
    scheduler.open(replace(sequence("late"), remaining_ms=2000), now_s=10.0)
    scheduler.open(sequence("waiting"), now_s=10.0)
    assert set(shares(scheduler.plan(now_s=11.9))) == {"late", "waiting"}
    plan = scheduler.plan(now_s=12.0)
    assert set(shares(plan)) == {"waiting"}
    assert [(lost.key.stream, lost.retryable) for lost in plan.lost] == [("late", True)]
    assert scheduler.statistics().overdue == 1 and key("late") in plan.freed


def test_a_preempted_sequence_continues_where_it_was_once_blocks_are_free() -> None:
    scheduler = scheduler_of(blocks=2, step_tokens=1024, growth=0)
    scheduler.open(sequence("old", prompt=BLOCK_TOKENS - 4, max_tokens=12))
    scheduler.open(replace(sequence("young", prompt=5, max_tokens=30), last_choice=True))
    outputs: list[TokenOut | SequenceLost] = []
    waited = False
    while scheduler.has_work():
        outputs += run(scheduler)[1]
        if scheduler.statistics().preempted and not waited:
            waited = True
            with pytest.raises(Refused):
                scheduler.open(sequence("newcomer"))
    tokens = [out for out in outputs if isinstance(out, TokenOut)]
    drawn = {name: [out.position for out in tokens if out.key.stream == name] for name in ("old", "young")}
    assert waited and tokens == outputs
    assert drawn == {"old": list(range(BLOCK_TOKENS - 4, BLOCK_TOKENS + 8)), "young": list(range(5, 35))}
    assert scheduler.load().kv_blocks_used == 0 and scheduler.load().running == 0


def test_each_sequence_of_a_failed_step_is_retried_alone() -> None:
    scheduler = scheduler_of()
    for name in ("a", "bad", "c"):
        scheduler.open(sequence(name))
    assert scheduler.fail(scheduler.plan(), "it broke") == []
    drawn: dict[str, int] = {"a": 0, "c": 0}
    lost: list[str] = []
    while scheduler.has_work():
        plan = scheduler.plan()
        if "bad" in shares(plan):
            lost += [loss.key.stream for loss in scheduler.fail(plan, "it broke")]
            continue
        for out in scheduler.commit(plan, {chunk.sequence.key: [DrawResult(50)] for chunk in plan.chunks}):
            drawn[out.key.stream] += 1
    assert (lost, drawn) == (["bad"], {"a": 4, "c": 4})
    assert scheduler.load().kv_blocks_used == 0


def test_without_memory_for_a_step_its_youngest_sequence_is_lost() -> None:
    scheduler = scheduler_of()
    for name in ("old", "young"):
        scheduler.open(sequence(name))
    [lost] = scheduler.out_of_memory(scheduler.plan())
    assert lost.key.stream == "young" and lost.retryable
    assert shares(run(scheduler)[0]) == {"old": (0, 5)}
    [lost] = scheduler.out_of_memory(scheduler.plan())
    assert lost.key.stream == "old" and scheduler.load().kv_blocks_used == 0
