"""A bad sequence or frame affects no other: the other sequences of its batch stay exact, and the node continues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from mesh.errors import BadRequest
from mesh.view import Span
from node.engine.api import HiddenOut, SequenceKey, SequenceLost, TokenOut
from node.engine.faults import is_out_of_memory
from tests.engine.test_prefix_cache import SplitPath, ask, bits, numbers
from tests.engine.test_worker import MODEL, Running, opening, running

NAMES = ("a", "b", "c")
WHOLE = Span(MODEL, 0, 4)
SENT = "the stage before layers 2:4 of toy sent activations that are not finite numbers"
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
)


def rows(name: str, count: int) -> bytes:
    noise = np.random.Generator(np.random.Philox(sum(map(ord, name))))
    return noise.normal(size=(count, 64)).astype("<f4").tobytes()


def ends(one: Running, count: int) -> dict[str, list[TokenOut] | SequenceLost]:
    """Waits for the end of `count` sequences; returns the tokens or the loss of each by stream."""
    results: dict[str, Any] = {}
    while count:
        out = one.next()
        if isinstance(out, SequenceLost):
            results[out.key.stream] = out
        elif isinstance(out, TokenOut):
            results.setdefault(out.key.stream, []).append(out)
        count -= isinstance(out, SequenceLost) or (isinstance(out, TokenOut) and out.finish is not None)
    return results


def computed_together(one: Running, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Any]) -> dict[str, Any]:
    """Computes three sequences that are open before the first step; `spoil(forward, …)` replaces each forward pass."""
    stage = one.engine.stage(WHOLE)
    forward = stage.forward
    with monkeypatch.context() as patch:
        patch.setattr(stage, "forward", lambda *args, **named: spoil(forward, *args, **named))
        with one.engine._lock:
            for name in NAMES:
                one.engine.open(opening(name, tokens=numbers(ord(name), 40), logprobs=2))
        return ends(one, len(NAMES))


def plain(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return forward(*args, **named)


def test_a_sequence_with_nan_logits_fails_alone(checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with running((checkpoint_of("llama"), 0, 4), speculates=False) as one:
        expected = computed_together(one, monkeypatch, plain)
        steps = 0

        def poison(forward: Callable[..., Any], *args: Any, **named: Any) -> torch.Tensor:
            nonlocal steps
            steps += 1
            logits: torch.Tensor = forward(*args, **named).clone()
            if steps == 4:
                logits[1] = float("nan")
            return logits

        results = computed_together(one, monkeypatch, poison)
        assert isinstance(results["b"], SequenceLost) and not results["b"].retryable
        assert all(bits(results[name]) == bits(expected[name]) for name in "ac")


def spoiled_rows(bad: float, kind: str) -> bytes:
    """Returns 37 rows with one number replaced by `bad`, as float32 or bfloat16."""
    sent = np.frombuffer(rows("bad", 37), "<f4").reshape(37, 64).copy()
    sent[17, 5] = bad
    return sent.tobytes() if kind == "float32" else (sent.view("<u4") >> 16).astype("<u2").tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_non_finite_activations_are_refused_alone_with_the_peer_as_cause(
    kind: str, bad: float, checkpoint_of: Callable[[str], Path]
) -> None:
    with running((checkpoint_of("llama"), 2, 4), dtype=kind) as one:
        answers = []
        for beside_bad in (False, True):
            good, bad_request = opening(f"good{beside_bad}", 2, 4, max_tokens=1, logprobs=3), opening("bad", 2, 4)
            one.engine.open(good)
            if beside_bad:
                one.engine.open(bad_request)
            pushes = [HiddenOut(bad_request.key, 0, 37, spoiled_rows(bad, kind))] if beside_bad else []
            one.engine.push(*pushes, HiddenOut(good.key, 0, 37, rows("good", 37)))  # one call: computed in one step
            results = ends(one, 1 + beside_bad)
            answers.append(bits(results[good.key.stream]))  # type: ignore[arg-type]
            assert results.get("bad") == (SequenceLost(bad_request.key, SENT, by_previous=True) if beside_bad else None)
        assert answers[0] == answers[1]
        statistics = one.engine.statistics()
        assert (statistics.bad_activations_total, statistics.numeric_failures_total) == (1, 0)
        assert one.engine.load_report().running == one.engine.load_report().kv_blocks_used == 0


def test_a_step_of_only_non_finite_activations_computes_nothing(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 2, 4), dtype="float32") as one:
        for name in NAMES:
            one.engine.open(opening(name, 2, 4))
        one.engine.push(*(HiddenOut(opening(name).key, 0, 37, spoiled_rows(np.nan, "float32")) for name in NAMES))
        results = ends(one, len(NAMES))
        assert all(lost == SequenceLost(opening(name).key, SENT, by_previous=True) for name, lost in results.items())
        assert one.engine.load_report().kv_blocks_used == 0 and one.engine.statistics().prefill_tokens == 0
        one.engine.open(opening("good", 2, 4, max_tokens=1))
        one.engine.push(HiddenOut(opening("good").key, 0, 37, rows("good", 37)))
        assert isinstance(ends(one, 1)["good"], list)


def test_overflow_in_a_stage_is_a_model_failure_and_is_not_sent(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running((checkpoint_of("llama"), 0, 2)) as one:
        stage = one.engine.stage(Span(MODEL, 0, 2))
        forward = stage.forward

        def overflow(*args: Any, **named: Any) -> torch.Tensor:
            out = forward(*args, **named).clone()
            out[45, 3] = float("inf")  # a row of the second sequence: each has 40 rows
            return out

        monkeypatch.setattr(stage, "forward", overflow)
        with one.engine._lock:
            for name in NAMES:
                one.engine.open(opening(name, 0, 2, tokens=numbers(ord(name), 40)))
        outputs = [one.next() for _ in NAMES]
        sent = {str(out.key.stream): out for out in outputs if isinstance(out, HiddenOut | SequenceLost)}
        lost = sent["b"]
        assert isinstance(lost, SequenceLost) and not lost.by_previous and not lost.retryable
        assert (
            lost.reason == "layers 0:2 of toy computed numbers that are not finite: a failure of the model's numbers, of no peer"
        )
        assert all(isinstance(sent[name], HiddenOut) for name in "ac")
        statistics = one.engine.statistics()
        assert (statistics.bad_activations_total, statistics.numeric_failures_total) == (0, 1)


def test_a_page_with_non_finite_numbers_is_not_kept(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running((checkpoint_of("llama"), 0, 4), speculates=False) as one:
        path = SplitPath((one, 0, 4))
        cold = path.answer("cold", numbers(1, 70))
        stage = one.engine.stage(WHOLE)
        forward = stage.forward

        @torch.inference_mode()
        def spoil(start: int, end: int, segments: list[Any], *args: Any, **named: Any) -> torch.Tensor:
            out: torch.Tensor = forward(start, end, segments, *args, **named)
            if segments[0].position < 40 <= segments[0].position + segments[0].count:
                segments[0].kv.write(2, 40, torch.full((1, 2, 2, 16), float("nan"), dtype=stage.kernel.dtype))
            return out

        with monkeypatch.context() as patch:
            patch.setattr(stage, "forward", spoil)
            before = one.engine.statistics().scheduler.pages
            one.engine.open(ask("spoiled", numbers(2, 70)))
            assert isinstance(ends(one, 1)["spoiled"], SequenceLost)
        assert one.engine.statistics().scheduler.pages == before + 1, "the first of two pages"
        assert path.answer("again", numbers(2, 70))[0].cached == 32
        assert bits(path.answer("warm", numbers(1, 70))) == bits(cold)


def test_a_sequence_that_breaks_every_step_is_isolated_and_others_continue(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running((checkpoint_of("llama"), 0, 4)) as one:
        expected = computed_together(one, monkeypatch, plain)
        culprit = next(token for token in numbers(ord("b"), 40) if token not in numbers(ord("a"), 40) + numbers(ord("c"), 40))

        def break_down(forward: Callable[..., Any], *args: Any, **named: Any) -> torch.Tensor:
            if culprit in named["ids"] and len(named["ids"]) >= 40:  # a prefill with this token, not a step that drew it
                raise ArithmeticError("this one")
            computed: torch.Tensor = forward(*args, **named)
            return computed

        results = computed_together(one, monkeypatch, break_down)
        assert isinstance(results["b"], SequenceLost) and "ArithmeticError" in results["b"].reason
        assert all(bits(results[name]) == bits(expected[name]) for name in "ac")
        assert one.engine.statistics().scheduler.isolated == 1
        assert one.engine.load_report().kv_blocks_used == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(NO_MEMORY), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_ends_the_youngest_sequence_and_not_the_node(
    error: Exception, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running((checkpoint_of("llama"), 0, 4)) as one:
        expected = computed_together(one, monkeypatch, plain)

        def too_much(
            forward: Callable[..., Any], segments_of: Any, end: int, segments: list[Any], *args: Any, **named: Any
        ) -> Any:
            if len(segments) > 2:
                raise error
            return forward(segments_of, end, segments, *args, **named)

        results = computed_together(one, monkeypatch, too_much)
        lost = results["c"]
        assert isinstance(lost, SequenceLost) and lost.retryable and "memory" in lost.reason
        assert all(bits(results[name]) == bits(expected[name]) for name in "ab")


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("Tensors must have the same shape")) and not is_out_of_memory(KeyError("x"))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": (5, 512), "known": 2, "prompt_tokens": 2},
        {"tokens": (5, -1), "known": 2, "prompt_tokens": 2},
        {"tokens": (), "known": 0, "prompt_tokens": 0},
        {"known": 2**62},
        {"prompt_tokens": 2**62},
        {"known": -5, "tokens": ()},
    ],
)
def test_a_sequence_that_can_never_be_served_is_refused(changes: dict[str, Any], checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 0, 4)) as one:
        with pytest.raises(BadRequest):
            one.engine.open(replace(opening("a"), **changes))
        sequence = ask("b", numbers(1, 70))
        assert sequence.prefix is not None
        for names in ((), sequence.prefix.names[:1], (b"short", b"short"), (*sequence.prefix.names, b"x" * 16)):
            with pytest.raises(BadRequest, match="names of 16 bytes"):
                one.engine.open(replace(sequence, prefix=replace(sequence.prefix, names=names)))
        assert one.engine.load_report().running == 0


GOOD = HiddenOut(opening("a").key, 0, 3, rows("a", 3))
BAD_FRAMES = {
    "another attempt": HiddenOut(SequenceKey(GOOD.key.stream, 0, 2), 0, 3, GOOD.data),
    "a row too few": HiddenOut(GOOD.key, 0, 3, rows("a", 2)),
    "eight bytes a number": HiddenOut(GOOD.key, 0, 3, rows("a", 6)),
    "half a number": HiddenOut(GOOD.key, 0, 3, GOOD.data[:-2]),
    "a gap": HiddenOut(GOOD.key, 1, 3, GOOD.data),
    "a gap of a page": HiddenOut(GOOD.key, 32, 3, GOOD.data),
    "nothing": HiddenOut(GOOD.key, 0, 0, b""),
    "past the end": HiddenOut(GOOD.key, 0, 80, rows("a", 80)),
    "guesses within the prompt": HiddenOut(GOOD.key, 0, 3, GOOD.data, draft=(1, 2)),
    "more guesses than rows": HiddenOut(GOOD.key, 0, 3, GOOD.data, draft=(1, 2, 3, 4)),
    "after a guess that no stage made": HiddenOut(GOOD.key, 0, 3, GOOD.data, rewinds=1),
    "names where none are kept": HiddenOut(GOOD.key, 0, 3, GOOD.data, names=(b"x" * 16,)),
}


@pytest.mark.parametrize("span", [(2, 4), (1, 3)])
@pytest.mark.parametrize("kind", BAD_FRAMES)
def test_activations_that_do_not_continue_the_sequence_are_counted_and_dropped(
    kind: str, span: tuple[int, int], stages: dict[tuple[int, int], Running]
) -> None:
    engine = stages[span].engine
    engine.open(opening("a", *span, bare=span[1] < 4))
    before = engine.statistics().scheduler.dropped
    engine.push(BAD_FRAMES[kind])
    row = engine._scheduler._sequences[GOOD.key]
    assert engine.statistics().scheduler.dropped == before + 1 and row.pushed_end == row.rewinds == 0 and not row.draft
    engine.push(GOOD)
    assert engine.statistics().scheduler.dropped == before + 1 and row.pushed_end == 3
    engine.close(GOOD.key)


@pytest.fixture(scope="module")
def stages(checkpoint_of: Callable[[str], Path]) -> dict[tuple[int, int], Running]:
    made = {}
    for start, end in ((2, 4), (1, 3)):
        made[start, end] = Running()
        made[start, end].engine.load(checkpoint_of("llama"), MODEL, start, end)
    return made
