"""Which linear kernels this machine can compute with: each is asked once, by a product of a tiny weight.

What a kernel needs differs from library to library: oneDNN refuses bfloat16 weights on a CPU with AVX2 alone, FBGEMM and
oneDNN are absent from some builds of torch, our own kernel needs a C compiler. No list of CPU features says all of that;
trying does.
"""

from __future__ import annotations

import functools

import torch

from node.engine.model.linear import Kernel

INPUTS, OUTPUTS, ROWS = 64, 48, 3
# The largest relative distance to the product in float32: several times that of a correct kernel, for it is to find faults.
QUANTIZED_TOLERANCE = {"int8": 0.05, "int4": 0.4}
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


@functools.cache
def refusal(kernel: Kernel) -> str:
    """Why `kernel` cannot be used on this machine; empty where it can. One line."""
    numbers = torch.Generator().manual_seed(11)
    weight = torch.randn(OUTPUTS, INPUTS, generator=numbers) / INPUTS**0.5
    rows = torch.randn(ROWS, INPUTS, generator=numbers)
    try:
        out = kernel.pack(weight.to(kernel.dtype), None)(rows.to(kernel.dtype)).float()
    except (RuntimeError, ValueError, AttributeError) as error:  # the library's own refusal, or torch was built without it
        return " ".join(str(error).split())[:200] or type(error).__name__
    expected = rows @ weight.t()
    distance = float((out - expected).norm() / expected.norm()) if out.shape == expected.shape else float("inf")
    if distance <= QUANTIZED_TOLERANCE.get(kernel.quantize, TOLERANCE[kernel.dtype]):
        return ""
    return f"its product of a small matrix is wrong (relative distance {distance:.2g})"
