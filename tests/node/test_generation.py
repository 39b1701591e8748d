"""The core of a generation: the client gets each token once, in order, with any losses on the way."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import BadRequest, DeadlineExceeded, NoPath, Refused
from mesh.ids import ModelId, NodeId
from node.entry.generation import (
    Cancelled,
    ClosePath,
    DoubtPeers,
    EmitToken,
    Fail,
    Finish,
    Generation,
    GenerationEffect,
    GenerationPhase,
    NoPathFound,
    Opened,
    OpenPath,
    OpenRefused,
    PathPlanned,
    PeerBack,
    PeerGone,
    PeerSuspect,
    PlanPath,
    StageLost,
    StopFound,
    TokenDrawn,
)
from routing.path import PathStage, PathStages

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
PATH = (PathStage(A, ("h", 1), 0, 3), PathStage(B, ("h", 2), 3, 6))
OTHER = (PathStage(A, ("h", 1), 0, 3), PathStage(C, ("h", 3), 3, 6))


def running(path: PathStages = PATH, prompt_tokens: int = 10) -> Generation:
    generation = Generation(prompt_tokens=prompt_tokens, deadline_at=100.0)
    assert generation.start(0.0) == [PlanPath(1, frozenset())]
    assert generation.receive(PathPlanned(1, path), 0.0) == [OpenPath(1, path, ())]
    assert generation.receive(Opened(1), 0.0) == []
    return generation


def failed_by(effect: GenerationEffect, error: type[Exception]) -> bool:
    return isinstance(effect, Fail) and isinstance(effect.error, error)


def test_tokens_reach_the_client_in_order_and_the_last_one_ends_it() -> None:
    generation = running()

    assert generation.receive(TokenDrawn(1, 10, 7), 1.0) == [EmitToken(10, 7)]
    assert generation.receive(TokenDrawn(1, 11, 8, finish="length"), 1.0) == [
        EmitToken(11, 8, "length"),
        ClosePath(1, PATH),
        Finish("length"),
    ]
    assert generation.ended and generation.deadline == math.inf


def test_a_lost_stage_leads_to_a_replay_on_a_path_without_it() -> None:
    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)

    assert generation.receive(StageLost(1, B, "link broke"), 1.0) == [ClosePath(1, PATH, B), PlanPath(2, frozenset({B}))]
    assert generation.receive(PathPlanned(2, OTHER), 1.0) == [OpenPath(2, OTHER, (7,))]
    assert generation.receive(TokenDrawn(2, 11, 9), 2.0) == [EmitToken(11, 9)]


def test_events_of_an_older_attempt_change_nothing() -> None:
    generation = running()
    generation.receive(StageLost(1, B, "link broke"), 1.0)
    generation.receive(PathPlanned(2, OTHER), 1.0)

    for late in (TokenDrawn(1, 10, 7), StageLost(1, A, "late"), Opened(1), OpenRefused(1, A), PathPlanned(1, PATH)):
        assert generation.receive(late, 1.0) == []
    assert generation.tokens == []


def test_a_repeated_token_is_dropped_and_a_gap_loses_the_attempt() -> None:
    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)

    assert generation.receive(TokenDrawn(1, 10, 7), 1.0) == []
    assert generation.receive(TokenDrawn(1, 12, 9), 1.0) == [ClosePath(1, PATH), PlanPath(2, frozenset())]


def test_a_death_off_the_path_is_remembered_for_the_next_plan() -> None:
    generation = running()

    assert generation.receive(PeerGone(C, "dead"), 1.0) == []
    assert generation.receive(PeerGone(B, "dead"), 1.0) == [ClosePath(1, PATH, B), PlanPath(2, frozenset({B, C}))]


def test_a_refused_open_queues_again_and_is_no_loss() -> None:
    generation = Generation(prompt_tokens=10, deadline_at=100.0)
    assert generation.start(0.0) == [PlanPath(1, frozenset())]
    for attempt in range(1, 20):
        generation.receive(PathPlanned(attempt, PATH), 0.0)
        assert generation.receive(OpenRefused(attempt, A), 0.0) == [PlanPath(attempt + 1, frozenset())]
    assert generation.phase is GenerationPhase.QUEUED and generation.history == []


def test_a_request_that_can_never_fit_on_a_node_is_planned_elsewhere() -> None:
    never = BadRequest("it needs 40 blocks, this node has 10", "max_tokens")
    generation = Generation(prompt_tokens=10, deadline_at=100.0)
    generation.start(0.0)
    generation.receive(PathPlanned(1, PATH), 0.0)

    assert generation.receive(OpenRefused(1, B, never), 0.0) == [PlanPath(2, frozenset(), frozenset({B}))]
    assert generation.receive(NoPathFound(2, NoPath(ModelId("m"), ((3, 6),))), 0.0) == [Fail(never)]


def test_room_is_waited_for_until_the_deadline_before_and_after_a_loss() -> None:
    fresh = Generation(prompt_tokens=10, deadline_at=100.0)
    fresh.start(0.0)
    begun = running()
    begun.receive(TokenDrawn(1, 10, 7), 0.0)
    begun.receive(StageLost(1, C, "link broke"), 0.0)
    for generation in (fresh, begun):
        assert generation.phase is GenerationPhase.QUEUED and generation.deadline == 100.0
        assert generation.tick(99.9) == []
        [fail] = generation.tick(100.0)
        assert failed_by(fail, DeadlineExceeded)


def test_a_full_node_is_waited_for_beside_one_that_never_fits() -> None:
    never = BadRequest("it needs 40 blocks, this node has 10", "max_tokens")
    generation = Generation(prompt_tokens=10, deadline_at=100.0)
    generation.start(0.0)
    generation.receive(PathPlanned(1, PATH), 0.0)
    generation.receive(OpenRefused(1, B), 0.0)
    generation.receive(PathPlanned(2, OTHER), 0.0)

    assert generation.receive(OpenRefused(2, C, never), 0.0) == [PlanPath(3, frozenset(), frozenset({C}))]
    assert generation.phase is GenerationPhase.QUEUED


def test_without_a_path_a_new_request_fails_and_a_begun_one_waits() -> None:
    no_path = NoPath(ModelId("m"), ((3, 6),))
    fresh = Generation(prompt_tokens=10, deadline_at=100.0)
    fresh.start(0.0)
    assert fresh.receive(NoPathFound(1, no_path), 0.0) == [Fail(no_path)]

    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)
    generation.receive(StageLost(1, B, "dead"), 1.0)
    assert generation.receive(NoPathFound(2, no_path), 1.0) == []
    assert generation.tick(1.25) == [PlanPath(3, frozenset({B}))]
    generation.receive(PathPlanned(3, OTHER), 1.3)
    assert generation.receive(TokenDrawn(3, 11, 9), 2.0) == [EmitToken(11, 9)]


def test_silence_loses_the_attempt_and_the_deadline_ends_the_request() -> None:
    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)
    generation.tick(2.0)
    assert generation.deadline == 31.0
    assert generation.tick(31.0) == [ClosePath(1, PATH), PlanPath(2, frozenset())]
    generation.receive(PathPlanned(2, OTHER), 31.0)
    [close, fail] = generation.tick(100.0)
    assert close == ClosePath(2, OTHER) and failed_by(fail, DeadlineExceeded)


def test_the_nodes_of_a_silent_attempt_are_probed_once_a_token() -> None:
    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)

    assert generation.deadline == 2.0
    assert generation.tick(2.0) == [DoubtPeers(frozenset({A, B}))]
    assert generation.deadline == 31.0
    generation.receive(TokenDrawn(1, 11, 7), 5.0)
    assert generation.tick(6.0) == [DoubtPeers(frozenset({A, B}))]


def test_a_prefill_may_be_silent_for_as_long_as_it_may_take() -> None:
    generation = running(prompt_tokens=1000)

    assert generation.deadline == 1000 / 20 + 1.0
    assert generation.receive(PeerSuspect(B), 3.0) == []


@pytest.mark.parametrize("suspect_at", [1.5, 2.5])
def test_a_silent_suspect_is_left_before_membership_declares_it_dead(suspect_at: float) -> None:
    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)

    effects = []
    for at in sorted((suspect_at, 2.0)):
        effects += generation.tick(at) if at == 2.0 else generation.receive(PeerSuspect(B), at)
    assert effects[-2:] == [ClosePath(1, PATH), PlanPath(2, frozenset())]
    assert generation.receive(PathPlanned(2, OTHER), 2.5) == [OpenPath(2, OTHER, (7,))]


def test_a_suspect_that_does_not_answer_an_open_is_left() -> None:
    generation = Generation(prompt_tokens=10, deadline_at=100.0)
    generation.start(0.0)
    generation.receive(PathPlanned(1, PATH), 0.0)

    assert generation.tick(1.0) == [DoubtPeers(frozenset({A, B}))]
    assert generation.receive(PeerSuspect(B), 1.4) == [ClosePath(1, PATH), PlanPath(2, frozenset())]


def test_a_request_that_waits_for_room_probes_no_node() -> None:
    generation = Generation(prompt_tokens=10, deadline_at=100.0)
    generation.start(0.0)
    for attempt, full in ((1, A), (2, B), (3, C)):
        generation.receive(PathPlanned(attempt, PATH), 0.0)
        generation.receive(OpenRefused(attempt, full), 0.0)

    assert generation.phase is GenerationPhase.QUEUED and generation.tick(50.0) == []


def test_a_suspect_that_sends_tokens_keeps_its_attempt() -> None:
    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)
    assert generation.receive(PeerSuspect(B), 1.5) == []
    generation.receive(TokenDrawn(1, 11, 7), 1.9)
    assert generation.receive(PeerBack(B), 2.0) == []
    assert generation.tick(2.9) == [DoubtPeers(frozenset({A, B}))]
    assert generation.receive(PeerSuspect(C), 3.0) == []


def test_suspicion_moves_an_attempt_once_until_its_next_token() -> None:
    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)
    generation.tick(2.0)
    assert generation.receive(PeerSuspect(B), 2.5) == [ClosePath(1, PATH), PlanPath(2, frozenset())]
    generation.receive(PathPlanned(2, PATH), 2.5)
    generation.receive(Opened(2), 2.5)
    assert generation.tick(10.0) == []
    assert generation.receive(PeerSuspect(B), 10.0) == []
    assert generation.receive(PeerGone(B, "dead"), 11.0) == [ClosePath(2, PATH, B), PlanPath(3, frozenset({B}))]


def test_a_node_that_has_returned_is_planned_with_at_once() -> None:
    generation = running()
    generation.receive(TokenDrawn(1, 10, 7), 1.0)
    generation.receive(PeerGone(B, "dead"), 1.0)
    generation.receive(NoPathFound(2, NoPath(ModelId("m"), ((3, 6),))), 1.0)

    assert generation.receive(PeerBack(B), 1.1) == [PlanPath(3, frozenset())]


def test_a_request_at_fault_fails_without_another_attempt() -> None:
    generation = running()
    error = BadRequest("token 99 is out of range", "prompt")

    assert generation.receive(StageLost(1, A, "bad", retryable=False, error=error), 1.0) == [ClosePath(1, PATH), Fail(error)]


def test_tokenless_attempts_end_the_request() -> None:
    generation = running()
    effects = []
    for attempt in range(1, 20):
        effects = generation.receive(StageLost(attempt, None, "step failed"), 1.0)
        if generation.ended:
            break
        generation.receive(PathPlanned(attempt + 1, PATH), 1.0)
    assert attempt == 6 and failed_by(effects[-1], Refused)


def test_unreachable_nodes_do_not_count_as_tokenless_attempts() -> None:
    generation, now = running(), 1.0
    generation.receive(TokenDrawn(1, 10, 7), now)
    for _ in range(3):  # all nodes have died at once, and membership takes its time
        generation.receive(PeerGone(A, "closed by the peer"), now)
        generation.receive(PathPlanned(generation.attempt, OTHER), now)
        generation.receive(StageLost(generation.attempt, C, "connection refused", unreachable=True), now)
        generation.receive(PathPlanned(generation.attempt, OTHER), now)
        generation.receive(StageLost(generation.attempt, B, "connection refused", unreachable=True), now)
        generation.receive(NoPathFound(generation.attempt, NoPath(ModelId("m"), ((0, 6),))), now)
        assert generation.phase is GenerationPhase.WAITING
        now += 4.0
        generation.tick(now)
    generation.receive(PathPlanned(generation.attempt, PATH), now)
    assert generation.receive(TokenDrawn(generation.attempt, 11, 9), now) == [EmitToken(11, 9)]


def test_the_only_node_is_tried_again_after_a_while_when_it_could_not_be_reached() -> None:
    generation = running((PathStage(A, ("h", 1), 0, 6),))
    generation.receive(TokenDrawn(1, 10, 7), 1.0)
    whole = (PathStage(A, ("h", 1), 0, 6),)
    assert generation.receive(PeerGone(A, "link broke"), 1.0) == [ClosePath(1, whole, A), PlanPath(2, frozenset({A}))]
    generation.receive(PathPlanned(2, whole), 1.0)
    assert generation.receive(StageLost(2, A, "refused", unreachable=True), 1.0) == [ClosePath(2, whole, A)]
    assert generation.phase is GenerationPhase.WAITING and 1.0 < generation.deadline < 2.0
    assert generation.tick(generation.deadline) == [PlanPath(3, frozenset({A}))]


def test_nodes_that_stay_unreachable_are_not_waited_for_for_ever() -> None:
    generation, now = running(), 1.0
    generation.receive(TokenDrawn(1, 10, 7), now)
    effects = generation.receive(PeerGone(A, "dead"), now)
    while not generation.ended and now < 60.0:
        if generation.phase is GenerationPhase.QUEUED and generation.avoided:
            effects = generation.receive(NoPathFound(generation.attempt, NoPath(ModelId("m"), ((0, 6),))), now)
        elif generation.phase is GenerationPhase.QUEUED:
            generation.receive(PathPlanned(generation.attempt, PATH), now)
            effects = generation.receive(StageLost(generation.attempt, A, "refused", unreachable=True), now)
        else:
            now = generation.deadline
            effects = generation.tick(now)
    assert generation.phase is GenerationPhase.FAILED and failed_by(effects[-1], NoPath) and 20.0 < now < 26.0


def test_cancel_and_stop_free_the_path() -> None:
    generation = running()
    assert generation.receive(Cancelled(), 1.0) == [ClosePath(1, PATH)]
    assert generation.phase is GenerationPhase.CANCELLED

    generation = running()
    assert generation.receive(StopFound(), 1.0) == [ClosePath(1, PATH), Finish("stop")]


events = st.one_of(
    st.builds(PathPlanned, st.integers(1, 6), st.sampled_from([PATH, OTHER])),
    st.builds(Opened, st.integers(1, 6)),
    st.builds(OpenRefused, st.integers(1, 6), st.sampled_from([A, B, C])),
    st.builds(TokenDrawn, st.integers(1, 6), st.integers(8, 16), st.integers(0, 5), st.sampled_from([None, None, "stop"])),
    st.builds(StageLost, st.integers(1, 6), st.sampled_from([None, A, B]), st.just("x")),
    st.builds(PeerGone, st.sampled_from([A, B, C]), st.just("dead")),
    st.builds(PeerSuspect, st.sampled_from([A, B, C])),
    st.builds(PeerBack, st.sampled_from([A, B, C])),
    st.builds(NoPathFound, st.integers(1, 6), st.just(NoPath(ModelId("m"), ()))),
)


@settings(max_examples=300)
@given(st.lists(st.one_of(events, st.floats(0, 40)), max_size=60))
def test_tokens_are_emitted_once_in_order_and_every_open_path_is_closed(steps: list[Any]) -> None:
    generation, now = Generation(prompt_tokens=10, deadline_at=500.0), 0.0
    effects = generation.start(now)
    for step in steps:
        if isinstance(step, float):
            now += step
            effects += generation.tick(now)
            assert generation.deadline > now
        else:
            effects += generation.receive(step, now)
    effects += generation.tick(1000.0)

    assert generation.ended
    assert [e.position for e in effects if isinstance(e, EmitToken)] == list(range(10, 10 + len(generation.tokens)))
    closed = [e.attempt for e in effects if isinstance(e, ClosePath)]
    refused = {step.attempt for step in steps if isinstance(step, OpenRefused)}  # their stages were closed by the shell
    assert len(closed) == len(set(closed))
    assert {e.attempt for e in effects if isinstance(e, OpenPath)} - refused <= set(closed)
    assert sum(isinstance(e, Finish | Fail) for e in effects) == 1
    opened = [e for e in effects if isinstance(e, OpenPath)]
    for earlier, later in itertools.pairwise(opened):
        assert earlier.attempt < later.attempt
        assert later.tokens[: len(earlier.tokens)] == earlier.tokens


def test_an_evicted_sequence_queues_again_and_blames_no_node() -> None:
    generation = running()
    for attempt in range(1, 20):
        evicted = StageLost(attempt, B, "evicted", no_room=True)
        assert generation.receive(evicted, 1.0) == [ClosePath(attempt, PATH), PlanPath(attempt + 1, frozenset())]
        generation.receive(PathPlanned(attempt + 1, PATH), 1.0)
    assert generation.receive(TokenDrawn(20, 10, 7), 1.0) == [EmitToken(10, 7)]
