"""The contract of exactness as a matrix: logits, keys and values of an exact node are equal bit by bit in every cell.

Rows: a dense model and a mixture of experts; each dtype; one thread and two; with the kernel that a node would choose.
Columns: all the ways in which a sequence can be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch

from mesh.view import is_exact
from node.engine.loading import LoadedStage, load_stage
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.local_stage import LocalStage
from tests.engine.test_exactness import Part, Sequence, assert_same, continued, generate, prompt, step

PROMPT, ANSWER = 140, 5
LINES = [
    ("llama", "float32", "none", 1),
    ("llama", "float32", "none", 2),
    ("llama", "bfloat16", "none", 1),
    ("llama", "bfloat16", "none", 2),
    ("llama", "bfloat16", "int8", 1),
    ("llama", "float32", "int8", 2),
    ("mixtral", "float32", "none", 1),
    ("mixtral", "bfloat16", "none", 1),
]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def kept(sequence: Sequence, count: int) -> list[torch.Tensor]:
    """Returns the keys and values of the first `count` positions, by layer."""
    pages = [kv.page(0, count, range(start, end)) for kv, (_, start, end) in zip(sequence.kv, sequence.path)]
    return [page[layer] for page in pages for layer in sorted(page)]


def assert_same_bits(one: Sequence, other: Sequence) -> None:
    assert_same(one, other)
    count = min(one.computed, other.computed)
    assert all(map(torch.equal, kept(one, count), kept(other, count))), "keys or values differ"


def uncomputed(path: Collection[Part], known: Sequence | None = None, after: int = 0) -> Sequence:
    """Returns a sequence without computed positions: the prompt, or `known` up to `after` tokens of its answer."""
    return Sequence(prompt(1, PROMPT) if known is None else known.tokens[: PROMPT + after], path)


def beside_others(path: Collection[Part]) -> Sequence:
    """Computes a sequence in two prefill chunks, and decodes it in batches with sequences of other lengths."""
    one = uncomputed(path)
    others = [Sequence(prompt(seed, 9 * seed), path) for seed in range(2, 6)]
    step([(others[0], 18), (one, 83), (others[1], 27)])
    step([(others[2], 36), (others[0], 1), (one, PROMPT - 83), (others[3], 40)])
    for _ in range(ANSWER - 1):
        step([(others[0], 1), (others[1], 1), (others[2], 1), (one, 1)])
    return one


@pytest.mark.parametrize(("name", "dtype", "quantize", "threads"), LINES, indirect=["threads"])
def test_every_way_to_compute_a_sequence_gives_the_same_bits(
    name: str, dtype: str, quantize: str, threads: int, checkpoint_of: Callable[[str], Path]
) -> None:
    checkpoint = read_checkpoint(checkpoint_of(name))
    loaded: LoadedStage = load_stage(checkpoint, 0, 4, dtype, threads, quantize)
    assert is_exact(loaded.numerics) and loaded.stage.kernel.quantize == quantize
    kernel, whole = loaded.stage.kernel, loaded.stage
    early, late = LocalStage(checkpoint, 0, 3, kernel, threads), LocalStage(checkpoint, 1, 4, kernel, threads)
    early.pack()
    late.pack()
    path = [(whole, 0, 4)]

    alone = generate(uncomputed(path), chunk=512, answer=ANSWER)
    assert_same_bits(alone, beside_others(path))
    for chunk in (16, 128):
        assert_same_bits(alone, generate(uncomputed(path), chunk, ANSWER))
    for tokens in range(1, ANSWER):
        assert_same_bits(alone, generate(uncomputed(path, alone, after=tokens), 512, ANSWER - tokens))
    for pages in (1, 4):
        hit = continued(alone, 32 * pages, [32] * pages, PROMPT)
        assert_same_bits(alone, generate(hit, 512, ANSWER))
        preempted = continued(alone, 32 * pages, [32] * pages, PROMPT + 2)
        assert_same_bits(alone, generate(preempted, 512, ANSWER - 2))
    for split in ([(early, 0, 2), (late, 2, 4)], [(early, 0, 1), (early, 1, 3), (late, 3, 4)]):
        assert_same_bits(alone, generate(uncomputed(split), 33, ANSWER))
    assert_same_bits(alone, beside_others(split))
