"""A sequence's logits do not depend on its company: the same bits alone, batched, chunked, re-prefilled and split."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from node.engine.model.attention import Segment
from node.engine.model.local_stage import LocalStage
from node.engine.model.stage import Stage
from tests.engine.checkpoints import EXACT, WHOLE_ONLY
from tests.engine.devices import kernels, stage_on
from tests.engine.offered import BFLOAT16, FLOAT32

Part = tuple[Stage, int, int]
ANSWER = 6
COMPILED = ["mesh-bf16", "mesh-fp32", "mesh-int8", "mesh-int4-fp32"]


class Sequence:
    """Tokens and, for each stage of its path, keys and values; records the logits of each position it drew from."""

    def __init__(self, tokens: list[int], path: Collection[Part]) -> None:
        self.tokens = list(tokens)
        self.path = path
        self.kv = [stage.sequence() for stage, _, _ in path]
        self.computed = 0
        self.logits: dict[int, torch.Tensor] = {}


def step(rows: list[tuple[Sequence, int]]) -> None:
    """Computes the next `count` positions of each sequence in one packed batch; all take the same path."""
    hidden: torch.Tensor | None = None
    path = rows[0][0].path
    for number, (stage, start, end) in enumerate(path):
        segments: list[Segment] = []
        positions: list[int] = []
        ids: list[int] = []
        last: list[int] = []
        for sequence, count in rows:
            segments.append(Segment(len(positions), count, sequence.computed, sequence.kv[number]))
            positions += range(sequence.computed, sequence.computed + count)
            ids += sequence.tokens[sequence.computed : sequence.computed + count]
            last.append(len(positions) - 1)
        at = last if end == stage.layers else []
        hidden = stage.forward(start, end, segments, positions, ids=ids if start == 0 else None, hidden=hidden, logits_at=at)
    assert hidden is not None
    for (sequence, count), logits in zip(rows, hidden):
        sequence.computed += count
        if sequence.computed == len(sequence.tokens):
            sequence.logits[sequence.computed] = logits.clone()
            sequence.tokens.append(int(logits.argmax()))


def generate(sequence: Sequence, chunk: int, answer: int = ANSWER) -> Sequence:
    """Prefills in chunks, then decodes `answer` tokens greedily."""
    for _ in range(answer):
        while (left := len(sequence.tokens) - sequence.computed) > chunk:
            step([(sequence, min(chunk, left))])
        step([(sequence, left)])
    return sequence


def continued(whole: Sequence, computed: int, pages: list[int], tokens: int) -> Sequence:
    """`whole` as one that knows `tokens` of its tokens, and finds the first `computed` of them in pages of these sizes."""
    one = Sequence(whole.tokens[:tokens], whole.path)
    for number, (_, start, end) in enumerate(whole.path):
        bounds = [sum(pages[:index]) for index in range(len(pages) + 1)]
        kept = [whole.kv[number].page(at, upto - at, range(start, end)) for at, upto in pairwise(bounds) if upto <= computed]
        if kept:
            one.kv[number].restore(kept)
    one.computed = computed
    return one


def guessed_wrong(whole: Sequence) -> Sequence:
    """`whole` two tokens into its answer, after seven wrong guesses were computed behind them."""
    one = continued(whole, 0, [], 72)
    one.tokens += [(token + 1) % 500 for token in whole.tokens[-4:]] + [7, 8, 9]
    step([(one, len(one.tokens))])
    one.tokens, one.computed, one.logits = whole.tokens[:72], 71, {}
    return one


def prompt(seed: int, count: int) -> list[int]:
    return torch.randint(3, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same(one: Sequence, other: Sequence) -> None:
    common = sorted(set(one.logits) & set(other.logits))
    assert common, "nothing to compare"
    for position in common:
        assert torch.equal(one.logits[position], other.logits[position]), f"logits differ behind position {position - 1}"
    assert one.tokens == other.tokens


def load(directory: Path, start: int, end: int, kernel: str) -> LocalStage:
    return stage_on(directory, start, end, kernel)


@pytest.mark.parametrize("kernel", kernels(*COMPILED, "onednn-fp32", "onednn-bf16", "fbgemm-fp16", "aten-fp32"))
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_tokens_and_logits_are_bit_equal_however_a_sequence_is_computed(
    name: str, kernel: str, checkpoint_of: Callable[[str], Path]
) -> None:
    directory = checkpoint_of(name)
    whole, early, late = (load(directory, start, end, kernel) for start, end in ((0, 4), (0, 3), (1, 4)))
    alone = generate(Sequence(prompt(1, 70), [(whole, 0, 4)]), chunk=512)

    assert_same(alone, generate(Sequence(prompt(1, 70), [(whole, 0, 4)]), chunk=16))

    again = Sequence(alone.tokens[: 70 + 3], [(whole, 0, 4)])  # failover after three tokens
    assert_same(alone, generate(again, chunk=512, answer=ANSWER - 3))

    batched = Sequence(prompt(1, 70), [(whole, 0, 4)])
    others = [Sequence(prompt(seed, 9 * seed), [(whole, 0, 4)]) for seed in range(2, 6)]
    step([(others[0], 18), (batched, 41), (others[1], 27)])
    step([(others[2], 36), (others[0], 1), (batched, 29), (others[3], 40)])
    for _ in range(ANSWER - 1):
        step([(others[0], 1), (others[1], 1), (others[2], 1), (batched, 1)])
    assert_same(alone, batched)

    for pages in (1, 2):  # a prefix-cache hit, short or long; then one that was preempted after three tokens
        hit = continued(alone, 32 * pages, [32, 32], 70)
        assert_same(alone, generate(hit, chunk=16))
        preempted = continued(alone, 32 * pages, [32, 32], 70 + 3)
        assert_same(alone, generate(preempted, chunk=512, answer=ANSWER - 3))
    assert_same(alone, generate(guessed_wrong(alone), chunk=512, answer=ANSWER - 2))

    for path in (
        [(early, 0, 2), (late, 2, 4)],
        [(early, 0, 1), (late, 1, 4)],
        [(early, 0, 1), (early, 1, 3), (late, 3, 4)],
        [(whole, 0, 2), (late, 2, 3), (whole, 3, 4)],
    ):
        assert_same(alone, generate(Sequence(prompt(1, 70), path), chunk=33))


@pytest.mark.parametrize("kernel", kernels(FLOAT32, BFLOAT16))
@pytest.mark.parametrize("name", [name for name in EXACT if name not in {"llama", "qwen2", "qwen3", "mistral", "gpt2"}])
def test_other_architectures_are_bit_equal_in_chunks_in_batches_and_split(
    name: str, kernel: str, checkpoint_of: Callable[[str], Path]
) -> None:
    directory = checkpoint_of(name)
    whole, late = load(directory, 0, 4, kernel), load(directory, 2, 4, kernel)
    first, last = load(directory, 0, 1, kernel), load(directory, 3, 4, kernel)
    alone = generate(Sequence(prompt(1, 45), [(whole, 0, 4)]), chunk=512, answer=3)
    for path in ([(whole, 0, 2), (late, 2, 4)], [(first, 0, 1), (whole, 1, 3), (last, 3, 4)]):
        assert_same(alone, generate(Sequence(prompt(1, 45), path), chunk=16, answer=3))
    batched, other = Sequence(prompt(1, 45), [(whole, 0, 4)]), Sequence(prompt(2, 30), [(whole, 0, 4)])
    step([(other, 30), (batched, 45)])
    step([(batched, 1), (other, 1)])
    assert all(torch.equal(batched.logits[position], alone.logits[position]) for position in (45, 46))


@pytest.mark.parametrize("kernel", kernels(FLOAT32))
@pytest.mark.parametrize("name", WHOLE_ONLY)
def test_architectures_that_are_served_whole_are_bit_equal_in_chunks_and_in_batches(
    name: str, kernel: str, checkpoint_of: Callable[[str], Path]
) -> None:
    path = [(load(checkpoint_of(name), 0, 4, kernel), 0, 4)]
    alone = generate(Sequence(prompt(1, 45), path), chunk=512, answer=3)
    assert_same(alone, generate(Sequence(prompt(1, 45), path), chunk=16, answer=3))
    batched, other = Sequence(prompt(1, 45), path), Sequence(prompt(2, 30), path)
    step([(other, 30), (batched, 45)])
    step([(batched, 1), (other, 1)])
    assert all(torch.equal(batched.logits[position], alone.logits[position]) for position in (45, 46))


@pytest.mark.parametrize("kernel", kernels(*COMPILED[:2], "onednn-fp32", "onednn-bf16"))
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_sequences_longer_than_a_block_are_bit_equal_too(name: str, kernel: str, checkpoint_of: Callable[[str], Path]) -> None:
    whole = load(checkpoint_of(name), 0, 4, kernel)
    path = [(whole, 0, 4)]
    alone = generate(Sequence(prompt(1, 1021), path), chunk=2048)  # decodes across position 1024
    assert_same(alone, generate(Sequence(prompt(1, 1021), path), chunk=128))
    assert_same(alone, generate(Sequence(prompt(1, 1021), path), chunk=16))
    assert_same(alone, generate(continued(alone, 992, [32] * 31, 1021), chunk=16))
    assert_same(alone, generate(continued(alone, 512, [32] * 16, 1024), chunk=128, answer=ANSWER - 3))
    assert_same(alone, generate(Sequence(alone.tokens[:1025], path), chunk=300, answer=ANSWER - 4))
    batched, other = Sequence(prompt(1, 1021), path), Sequence(prompt(2, 100), path)
    step([(other, 90), (batched, 400)])
    step([(batched, 621), (other, 10)])
    for _ in range(ANSWER - 1):
        step([(other, 1), (batched, 1)])
    assert_same(alone, batched)
