"""Finds the linear kernels that this machine can compute with: each is tried once, with a product of a tiny weight.

Requirements differ from library to library: oneDNN refuses bfloat16 weights on a CPU with AVX2 alone, FBGEMM and oneDNN
are absent from some builds of torch, the compiled kernel needs a C compiler. No list of CPU features covers all of this.
"""

from __future__ import annotations

import functools

import torch

from node.engine.model.linear import Kernel

INPUTS, OUTPUTS, ROWS = 64, 48, 3
# The largest relative distance to the product in float32: several times that of a correct kernel, so that faults alone exceed it.
QUANTIZED_TOLERANCE = {"int8": 0.05, "int4": 0.4}
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


@functools.cache
def refusal(kernel: Kernel) -> str:
    """Returns why `kernel` cannot be used on this machine, in one line; empty where it can."""
    numbers = torch.Generator().manual_seed(11)
    weight = torch.randn(OUTPUTS, INPUTS, generator=numbers) / INPUTS**0.5
    rows = torch.randn(ROWS, INPUTS, generator=numbers)
    try:
        out = kernel.pack(weight.to(kernel.dtype), None)(rows.to(kernel.dtype)).float()
    except (RuntimeError, ValueError, AttributeError) as error:  # the library refuses, or torch was built without it
        return " ".join(str(error).split())[:200] or type(error).__name__
    expected = rows @ weight.t()
    distance = float((out - expected).norm() / expected.norm()) if out.shape == expected.shape else float("inf")
    if distance <= QUANTIZED_TOLERANCE.get(kernel.quantize, TOLERANCE[kernel.dtype]):
        return ""
    return f"its product of a small matrix is wrong (relative distance {distance:.2g})"
