"""NaN and infinity stay within their own sequence: other sequences of the step, and later ones, keep their bits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from node.engine.faults import all_finite, finite_rows
from node.engine.model.attention import Segment
from node.engine.model.local_stage import LocalStage
from tests.engine.devices import kernels, stage_on
from tests.engine.offered import FLOAT32

NAN, INF = float("nan"), float("inf")
ON_CPU = ["mesh-bf16", "mesh-fp32", "mesh-int8", "mesh-int4-fp32", "onednn-fp32", "aten-fp32"]
PAGED = ["cuda-fp32", "cuda-bf16-tiled"]  # the kernels for GPUs, run on the CPU


def paths(names: tuple[str, ...], *on_cpu: str) -> list[Any]:
    """Returns each checkpoint with each kernel, as parameters of a test."""
    found = []
    for name in names:
        for kernel in kernels(*on_cpu):
            (said,), marks = (kernel.values, kernel.marks) if hasattr(kernel, "values") else ((kernel,), ())
            found.append(pytest.param(name, said, id=f"{name}-{said}", marks=marks))
    return found


PATHS = paths(("llama",), *ON_CPU, *PAGED)
PATHS += paths(("mistral", "gemma2", "gpt2"), FLOAT32, *PAGED)
PATHS += paths(("mixtral", "gpt_oss", "deepseek_v3"), FLOAT32)  # mixtures of experts


class Fed:
    """A sequence on the layers from 1 on, with random activations as input."""

    def __init__(self, stage: LocalStage, seed: int, bad: float | None = None) -> None:
        self.stage = stage
        self.numbers = torch.Generator().manual_seed(seed)
        self.kv = stage.sequence()
        self.computed = 0
        self.bad = bad
        self.out: list[torch.Tensor] = []

    def rows(self, count: int) -> torch.Tensor:
        rows = torch.randn(count, 64, generator=self.numbers)
        if self.bad is not None:
            rows[:: 1 + count // 3, 5] = self.bad  # one number of some of its rows
        return rows


def step(*fed: tuple[Fed, int]) -> None:
    segments, positions, rows = [], list[int](), []
    for one, count in fed:
        segments.append(Segment(len(positions), count, one.computed, one.kv))
        positions += range(one.computed, one.computed + count)
        rows.append(one.rows(count))
        one.computed += count
    stage = fed[0][0].stage
    out = stage.forward(1, 4, segments, positions, hidden=torch.cat(rows), logits_at=range(len(positions)))
    for (one, count), segment in zip(fed, segments):
        one.out.append(out[segment.row : segment.row + count].clone())


def alone(stage: LocalStage, *counts: int, seed: int = 1) -> torch.Tensor:
    one = Fed(stage, seed)
    for count in counts:
        step((one, count))
    return torch.cat(one.out)


@pytest.mark.parametrize(("name", "kernel"), PATHS)
def test_a_row_with_nan_changes_no_other_sequence_and_no_later_one(
    name: str, kernel: str, checkpoint_of: Callable[[str], Path]
) -> None:
    stage = stage_on(checkpoint_of(name), 1, 4, kernel)
    expected = alone(stage, 20, 30, 1, 1, 1)
    for order in (1, -1):  # the spoiled sequences behind the good ones, and before them
        good, short, *spoiled = (Fed(stage, seed, bad) for seed, bad in enumerate((None, None, NAN, INF, -INF), 1))
        longest, *others = spoiled
        step(*[(good, 20), (longest, 520), *((one, 7) for one in others)][::order])  # the longest outgrows a page, and its slot
        step(*[(good, 30), (short, 3), *((one, 9) for one in spoiled)][::order])
        for _ in range(3):
            step(*[(good, 1), (short, 1), *((one, 1) for one in spoiled)][::order])
        assert not any(torch.cat(one.out).isfinite().all() for one in spoiled), "the spoiled sequences have non-finite output"
        assert torch.equal(torch.cat(good.out), expected)
        assert torch.equal(torch.cat(short.out), alone(stage, 3, 1, 1, 1, seed=2))
        del spoiled, longest, others, good, short
        gc.collect()
        assert torch.equal(alone(stage, 20, 30, 1, 1, 1), expected), "a sequence in their slots is not affected"


@pytest.mark.parametrize("kernel", kernels(*ON_CPU, *PAGED))
def test_nan_of_a_wrong_guess_is_discarded_with_the_guess(kernel: str, checkpoint_of: Callable[[str], Path]) -> None:
    stage = stage_on(checkpoint_of("llama"), 1, 4, kernel)
    expected = alone(stage, 20, 1, 1)
    one = Fed(stage, 1)
    step((one, 20))
    kept, one.bad = one.numbers.get_state(), NAN
    step((one, 6))
    one.numbers.set_state(kept)
    one.bad, one.computed = None, 20
    del one.out[1:]
    step((one, 1))
    step((one, 1))
    assert torch.equal(torch.cat(one.out), expected)


LARGEST = {torch.float32: 3.4e38, torch.bfloat16: 3.3895e38}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_rows_recognises_exactly_the_finite_numbers(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(dtype)  # every bfloat16 number
    rows = torch.zeros(len(every), 5, dtype=dtype)
    rows[:, 3] = every
    assert torch.equal(finite_rows(rows), every.isfinite())
    large = torch.full((3, 100), LARGEST[dtype], dtype=dtype)  # a sum of these overflows
    assert finite_rows(large).all() and all_finite(large)
    large[1, 99] = NAN
    assert finite_rows(large).tolist() == [True, False, True] and not all_finite(large)
    assert finite_rows(large[:0]).tolist() == [] and all_finite(torch.ones(2, 3, 4, 5, dtype=dtype).transpose(1, 2))
