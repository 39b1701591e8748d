"""Packed linears: right, and the same bits whatever rows stand beside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from node.engine.kernels import machine
from node.engine.kernels.kernel_probe import refusal
from node.engine.model.linear import BUCKETS, KERNELS, agreeing_buckets, bucket_for, pack, pack_siblings, siblings
from tests.engine.offered import FLOAT32, needs, offered

EVERY = offered(*KERNELS)
SHAPES = [(64, 176), (176, 64), (256, 704), (512, 2048)]


def layer_of(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs).requires_grad_(False)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_keeps_its_bits_in_any_company(shape: tuple[int, int], name: str) -> None:
    kernel = KERNELS[name]
    packed = pack(layer_of(*shape).to(kernel.dtype), kernel)
    packed.buckets = agreeing_buckets(packed.product, shape[0], kernel.dtype)
    assert packed.buckets, "no two row counts agree"
    rows = torch.randn(700, shape[0], generator=torch.Generator().manual_seed(1)).to(kernel.dtype)
    together = packed(rows)
    for first, count in ((0, 1), (3, 1), (0, 2), (5, 3), (10, 7), (64, 33), (100, 129), (188, 512), (0, 699)):
        assert torch.equal(packed(rows[first : first + count]), together[first : first + count])


@pytest.mark.parametrize("name", EVERY)
def test_packed_layers_compute_what_the_plain_ones_do(name: str) -> None:
    kernel = KERNELS[name]
    plain = layer_of(64, 176)
    tolerance = {"int8": 5e-2, "int4": 0.3}.get(kernel.quantize, 3e-2 if kernel.dtype is torch.bfloat16 else 1e-3)
    rows = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        pack(layer_of(64, 176).to(kernel.dtype), kernel)(rows.to(kernel.dtype)).float(),
        plain(rows),
        atol=tolerance,
        rtol=tolerance,
    )
    turned = Conv1D(176, 64).requires_grad_(False)
    turned.weight.data, turned.bias.data = plain.weight.t().contiguous(), plain.bias
    torch.testing.assert_close(
        pack(turned.to(kernel.dtype), kernel)(rows.to(kernel.dtype)).float(), plain(rows), atol=tolerance, rtol=tolerance
    )


def test_siblings_compute_once_for_the_same_rows_and_apart_for_others() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = layer_of(64, 64, 1), layer_of(64, 32, 2), layer_of(64, 32, 3)

    attention, plain = Attention(), Attention()
    ((parent, names),) = siblings(attention)
    together = pack_siblings(parent, names, KERNELS[FLOAT32])
    calls = []
    product = together.product

    def counted(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return product(rows)

    together.product = counted
    first, second = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(1))
    for rows in (first, second, first):
        for name in names:
            torch.testing.assert_close(getattr(attention, name)(rows), getattr(plain, name)(rows), atol=1e-5, rtol=1e-5)
    assert calls == [2, 2, 2]
    torch.testing.assert_close(attention.v_proj(first), plain.v_proj(first), atol=1e-5, rtol=1e-5)  # out of turn
    torch.testing.assert_close(attention.v_proj(first), plain.v_proj(first), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 3000), st.sets(st.sampled_from(BUCKETS), min_size=1))
def test_a_bucket_holds_its_rows_and_wastes_none_of_a_smaller_one(rows: int, some: set[int]) -> None:
    buckets = tuple(sorted(some))
    bucket = bucket_for(rows, buckets)
    assert bucket >= rows
    assert bucket in buckets or bucket % buckets[-1] == 0
    assert not any(rows <= other < bucket for other in buckets)


def test_row_counts_that_round_differently_are_found_out() -> None:
    def product(rows: torch.Tensor) -> torch.Tensor:
        return rows * (1.5 if rows.shape[0] in (2, 24) else 1.0)

    assert agreeing_buckets(product, 8, torch.float32) == tuple(count for count in BUCKETS if count not in (2, 24))


@pytest.mark.parametrize("rest", [BUCKETS[4:6], BUCKETS[6:9], BUCKETS[4:12], BUCKETS[4:14], BUCKETS[4:]], ids=str)
def test_of_row_counts_that_round_in_two_ways_the_larger_set_is_taken(rest: tuple[int, ...]) -> None:
    def product(rows: torch.Tensor) -> torch.Tensor:
        return rows * (1.5 if rows.shape[0] in rest else 1.0)

    small = [count for count in BUCKETS if count not in rest]
    expected = small if len(small) > len(rest) else rest
    assert agreeing_buckets(product, 8, torch.float32) == tuple(expected)


def test_a_kernel_that_treats_places_differently_is_found_out() -> None:
    def product(rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.linspace(1.0, 1.1, rows.shape[0])[:, None] if rows.shape[0] > 4 else rows.clone()

    assert agreeing_buckets(product, 8, torch.float32) == ()


@needs("fbgemm-fp16")
def test_weights_beyond_float16_refuse_the_float16_kernel() -> None:
    layer = layer_of(8, 8)
    layer.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="too large for float16"):
        pack(layer, KERNELS["fbgemm-fp16"])


@given(st.sampled_from(["auto", "float32", "bfloat16"]), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_nothing_is_rounded_that_was_not_asked_for(wanted: str, stored: torch.dtype) -> None:
    names = [kernel.name for kernel in machine.candidates(wanted, stored)]
    if wanted == "auto" and stored is torch.float32:
        assert names == [name for name in ("mesh-fp32", "onednn-fp32", "aten-fp32") if not refusal(KERNELS[name])]
    if wanted == "auto" and stored is torch.float16:
        assert not any("bf16" in name for name in names)
    if wanted != "auto":
        assert {KERNELS[name].dtype for name in names} == {getattr(torch, wanted)}
