"""The engine through its public interface, with its thread and real models."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from mesh.errors import BadRequest, LocalError, Refused
from mesh.ids import ModelId, StreamId
from mesh.manifest import is_identity
from mesh.view import Span, is_exact
from node.engine.api import EngineConfig, EngineOutput, HiddenOut, OpenSequence, SequenceKey, SequenceLost, SpanLost, TokenOut
from node.engine.scheduling import step_timing
from node.engine.worker import TorchEngine
from node.requests import SamplingParams

MODEL = ModelId("toy")
PROMPT = tuple(range(20, 57))
WAIT_S = 20.0


class Running:
    """An engine and the outputs that it delivered."""

    def __init__(self, **config: Any) -> None:
        self.engine = TorchEngine(EngineConfig(**{"kv_memory_bytes": 64 << 20, **config}))
        self.outputs: queue.Queue[EngineOutput] = queue.Queue()
        self.forward: Callable[[EngineOutput], None] | None = None

    def deliver(self, outputs: list[EngineOutput]) -> None:
        for out in outputs:
            if self.forward is not None:
                self.forward(out)
            self.outputs.put(out)

    def next(self) -> EngineOutput:
        return self.outputs.get(timeout=WAIT_S)

    def tokens_of(self, key: SequenceKey) -> list[int]:
        """Waits for the end of a sequence and returns its tokens; outputs of other sequences stay in the queue."""
        tokens: list[int] = []
        others = []
        while True:
            out = self.next()
            if isinstance(out, SpanLost | HiddenOut) or out.key != key:
                others.append(out)
                continue
            assert isinstance(out, TokenOut), out
            tokens.append(out.token)
            if out.finish is not None:
                for other in others:
                    self.outputs.put(other)
                return tokens


@contextmanager
def running(*spans: tuple[Path, int, int], **config: Any) -> Iterator[Running]:
    one = Running(**config)
    for directory, start, end in spans:
        one.engine.load(directory, MODEL, start, end)
    one.engine.start(one.deliver)
    try:
        yield one
    finally:
        one.engine.stop()


def opening(
    name: str,
    start: int = 0,
    end: int = 4,
    tokens: tuple[int, ...] = PROMPT,
    prompt: int | None = None,
    attempt: int = 1,
    bare: bool = False,
    **sampling: Any,
) -> OpenSequence:
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.9, "seed": 5, **sampling})
    sent = () if bare else tokens
    return OpenSequence(StreamId(name), 0, attempt, MODEL, start, end, prompt or len(tokens), len(tokens), sent, params)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never became true"
        time.sleep(0.001)


def connect(first: Running, last: Running) -> None:
    """Connects two stages of a path: activations forward, tokens back."""

    def onward(out: EngineOutput) -> None:
        if isinstance(out, HiddenOut):
            last.engine.push(out)

    def back(out: EngineOutput) -> None:
        if isinstance(out, TokenOut):
            first.engine.token(out)

    first.forward, last.forward = onward, back


def alone(directory: Path, sequence: OpenSequence, **config: Any) -> list[int]:
    with running((directory, 0, 4), **config) as one:
        one.engine.open(sequence)
        return one.tokens_of(sequence.key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_the_same_batched_split_and_after_failover(dtype: str, checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    undisturbed = alone(directory, opening("a"), dtype=dtype)
    assert len(undisturbed) == 12 and len(set(undisturbed)) > 4

    with running((directory, 0, 4), dtype=dtype, step_tokens=24) as one:
        for number in range(5):
            one.engine.open(opening(f"other{number}", tokens=PROMPT[: 7 + 5 * number], seed=number))
        one.engine.open(opening("a"))
        assert one.tokens_of(opening("a").key) == undisturbed

    with running((directory, 0, 3), dtype=dtype) as first, running((directory, 1, 4), dtype=dtype) as last:
        connect(first, last)
        last.engine.open(opening("a", 2, 4))
        first.engine.open(opening("a", 0, 2))
        assert last.tokens_of(opening("a").key) == undisturbed

        so_far = PROMPT + tuple(undisturbed[:5])  # the first attempt was lost after five tokens: another split continues
        last.engine.open(opening("a", 1, 4, tokens=so_far, prompt=len(PROMPT), attempt=2))
        first.engine.open(opening("a", 0, 1, tokens=so_far, prompt=len(PROMPT), attempt=2))
        assert last.tokens_of(SequenceKey(StreamId("a"), 0, 2)) == undisturbed[5:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_of_several_steps_gives_the_same_answer(dtype: str, checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    assert alone(directory, opening("a"), dtype=dtype, step_tokens=16) == alone(directory, opening("a"), dtype=dtype)


def test_a_middle_stage_needs_no_tokens(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("qwen3")
    undisturbed = alone(directory, opening("a"))
    with running((directory, 0, 2)) as first, running((directory, 1, 3)) as middle, running((directory, 2, 4)) as last:
        connect(first, last)
        first.forward = lambda out: middle.engine.push(out)  # type: ignore[arg-type]
        middle.forward = lambda out: last.engine.push(out)  # type: ignore[arg-type]
        last.engine.open(opening("a", 3, 4))
        middle.engine.open(opening("a", 1, 3, bare=True))
        first.engine.open(opening("a", 0, 1))
        assert last.tokens_of(opening("a").key) == undisturbed
        assert last.engine.load_report().kv_blocks_used == 0, "the last stage frees a finished sequence without a close"
        assert middle.engine.load_report().running == 1
        middle.engine.close_streams(lambda stream: False)
        wait_until(lambda: middle.engine.load_report().kv_blocks_used == 0)


def test_one_engine_serves_several_spans_of_a_model_at_once(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    undisturbed = alone(directory, opening("a"))
    with running((directory, 0, 4), (directory, 0, 2)) as first, running((directory, 2, 4)) as last:
        connect(first, last)
        last.engine.open(opening("split", 2, 4))
        first.engine.open(opening("split", 0, 2))
        first.engine.open(opening("solo"))
        assert first.tokens_of(opening("solo").key) == undisturbed
        assert last.tokens_of(opening("split").key) == undisturbed


def test_activations_with_nan_lose_only_their_own_sequence(checkpoint_of: Callable[[str], Path]) -> None:
    good = np.random.Generator(np.random.Philox(1)).normal(size=(len(PROMPT), 64)).astype("<f4").tobytes()
    with running((checkpoint_of("llama"), 2, 4)) as one:
        answers = []
        for company in (False, True):
            name = f"good{company}"
            one.engine.open(opening(name, 2, 4, max_tokens=1))
            if company:
                one.engine.open(opening("bad", 2, 4))
                one.engine.push(
                    HiddenOut(opening("bad").key, 0, len(PROMPT), np.full((len(PROMPT), 64), np.nan, "<f4").tobytes())
                )
                lost = one.next()
                assert isinstance(lost, SequenceLost) and lost.by_previous and lost.key.stream == "bad"
            one.engine.push(HiddenOut(opening(name).key, 0, len(PROMPT), good))
            answers.append(one.tokens_of(opening(name).key))
        assert answers[0] == answers[1]


def test_a_failing_step_loses_its_sequences_and_not_the_thread(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint_of("llama")
    with running((directory, 0, 4)) as one:
        stage = one.engine.stage(Span(MODEL, 0, 4))
        with monkeypatch.context() as patch:
            patch.setattr(stage, "_slots", None)
            patch.setattr(stage, "buckets", ())
            one.engine.open(opening("a"))
            lost = one.next()
        assert isinstance(lost, SequenceLost) and lost.retryable and "IndexError" in lost.reason
        one.engine.open(opening("b"))
        assert len(one.tokens_of(opening("b").key)) == 12
        assert one.engine.statistics().step_failures == 1
        assert one.engine.load_report().kv_blocks_used == 0


def test_calls_return_while_a_step_computes(checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    computing, go_on = threading.Event(), threading.Event()
    with running((checkpoint_of("llama"), 0, 4)) as one:
        stage = one.engine.stage(Span(MODEL, 0, 4))
        forward = stage.forward

        def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
            computing.set()
            assert go_on.wait(WAIT_S)
            return forward(*args, **kwargs)

        monkeypatch.setattr(stage, "forward", slow)
        one.engine.open(opening("a"))
        assert computing.wait(WAIT_S)
        one.engine.open(opening("b"))  # each of these calls would block if the step held the lock
        one.engine.token(TokenOut(opening("b").key, 3, 3))
        one.engine.push(HiddenOut(opening("b").key, 0, 1, b""))
        one.engine.close(opening("a").key)
        assert one.engine.load_report().running == 1
        go_on.set()
        assert len(one.tokens_of(opening("b").key)) == 12  # and no token of "a", which was closed during the step
        assert one.outputs.empty()


def test_a_hanging_step_is_overdue_until_it_ends(checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    computing, go_on = threading.Event(), threading.Event()
    with running((checkpoint_of("llama"), 0, 4)) as one:
        assert one.engine.overdue_s() == 0.0
        one.engine.open(opening("a"))
        assert len(one.tokens_of(opening("a").key)) == 12
        stage = one.engine.stage(Span(MODEL, 0, 4))
        forward = stage.forward

        def hang(*args: Any, **kwargs: Any) -> torch.Tensor:
            computing.set()
            assert go_on.wait(WAIT_S)
            return forward(*args, **kwargs)

        monkeypatch.setattr(stage, "forward", hang)
        monkeypatch.setattr(step_timing, "STALL_AFTER_S", 0.0)
        one.engine.open(opening("b"))
        assert computing.wait(WAIT_S)
        wait_until(lambda: one.engine.overdue_s() > 0)
        go_on.set()
        assert len(one.tokens_of(opening("b").key)) == 12
        assert one.engine.overdue_s() == 0.0


def test_a_span_can_be_unloaded_during_a_step(checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    computing, go_on = threading.Event(), threading.Event()
    with running((checkpoint_of("llama"), 0, 4)) as one:
        stage = one.engine.stage(Span(MODEL, 0, 4))
        forward = stage.forward

        def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
            computing.set()
            assert go_on.wait(WAIT_S)
            return forward(*args, **kwargs)

        monkeypatch.setattr(stage, "forward", slow)
        one.engine.open(opening("a"))
        assert computing.wait(WAIT_S)
        one.engine.unload(Span(MODEL, 0, 4))
        go_on.set()
        lost = one.next()
        assert isinstance(lost, SequenceLost) and "unloaded" in lost.reason
        assert one.engine.statistics().step_failures == 0


def test_unloading_a_span_loses_its_sequences_and_frees_its_memory(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 1, 3)) as one:
        one.engine.open(opening("a", 1, 3, bare=True))
        one.engine.unload(Span(MODEL, 1, 3))
        lost = one.next()
        assert isinstance(lost, SequenceLost) and lost.retryable and "unloaded" in lost.reason
        with pytest.raises(LocalError):
            one.engine.open(opening("b", 1, 3, bare=True))
        assert one.engine.load_report().kv_blocks_total == 0


def test_spans_share_numerics_and_different_kernels_do_not(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    one, other = TorchEngine(EngineConfig(dtype="float32")), TorchEngine(EngineConfig(dtype="bfloat16"))
    cards = [one.load(directory, MODEL, 0, 2), one.load(directory, MODEL, 1, 4), other.load(directory, MODEL, 0, 2)]
    assert cards[0] == cards[1]
    assert cards[0].numerics != cards[2].numerics and cards[0].weights == cards[2].weights
    assert all(is_exact(card.numerics) for card in cards)
    assert is_identity(cards[0].weights)
    bare = one.inspect(directory, MODEL)
    assert (bare.layers, bare.max_model_len, bare.weights, bare.numerics) == (4, 2048, "", "")


def test_a_sequence_is_computed_only_by_the_weights_it_names(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 0, 4)) as one:
        held = one.engine.load(checkpoint_of("llama"), MODEL, 0, 4).weights
        with pytest.raises(LocalError, match="no loaded span holds layers 0:4 of toy with weights 0000000000000000"):
            one.engine.open(msgspec.structs.replace(opening("a", 0, 4), weights="0" * 64))
        for stream, weights in (("b", held), ("c", "")):
            one.engine.open(msgspec.structs.replace(opening(stream, 0, 4), weights=weights))


def test_a_bad_device_and_too_long_a_sequence_are_refused(checkpoint_of: Callable[[str], Path]) -> None:
    with pytest.raises(BadRequest, match="expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        TorchEngine(EngineConfig(device="gpu"))
    with running((checkpoint_of("llama"), 0, 4), kv_memory_bytes=1, max_sequences=1) as one:
        assert one.engine.load_report().kv_blocks_total == 1
        with pytest.raises(BadRequest, match="need 2 KV blocks"):
            one.engine.open(opening("long", max_tokens=600))


def test_sequences_above_the_limit_are_refused(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 1, 4), max_sequences=2) as one:
        for name in ("a", "b"):
            one.engine.open(opening(name, 1, 4))
        with pytest.raises(Refused, match="2 sequences"):
            one.engine.open(opening("c", 1, 4))
        one.engine.close(opening("a").key)
        one.engine.open(opening("c", 1, 4))
        one.engine.open(opening("c", 1, 4))  # a duplicate has no effect
        assert one.engine.load_report().running == 2


def test_loading_another_model_meanwhile_changes_no_token(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("gemma")
    long = opening("a", max_tokens=250)
    undisturbed = alone(directory, long)
    other = TorchEngine(EngineConfig(dtype="bfloat16"))  # loading makes bfloat16 torch's default type for a while
    with running((directory, 0, 4)) as one:
        one.engine.open(long)
        for number, name in enumerate(("llama", "gpt2", "qwen3", "phi3")):
            other.load(checkpoint_of(name), ModelId(f"other{number}"), 0, 4)
        assert one.tokens_of(long.key) == undisturbed


def test_quantised_weights_are_served_and_reported(random_model: Path) -> None:
    engine = TorchEngine(EngineConfig(quantize="int8"))
    plain = TorchEngine(EngineConfig())
    card, other = (each.load(random_model, MODEL, 0, 6) for each in (engine, plain))
    (kernel,) = engine.statistics().kernels.values()
    assert "int8" in kernel and " on " in kernel
    assert card.numerics != other.numerics and is_exact(card.numerics)
