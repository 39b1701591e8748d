"""Tells what went wrong in a step: lack of memory and numbers that are not finite end one sequence, anything else the step's."""

from __future__ import annotations

import torch

BF16_EXPONENT = 0x7F80  # its bits; all of them are set in NaN and infinity, and in no other number


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a GPU, or torch's CPU allocator (which says so in words alone) had no memory to give."""
    words = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error).lower() for word in words)


def finite_rows(rows: torch.Tensor) -> torch.Tensor:
    """Which of the rows `[rows, width]`, float32 or bfloat16, hold finite numbers alone: `[rows]`, at the price of one pass."""
    if rows.dtype is torch.bfloat16:
        return (rows.view(torch.int16) & BF16_EXPONENT).amax(1) < BF16_EXPONENT
    if bool(rows.sum(1).isfinite().all()):  # a sum may overflow, but is never finite where a number is not
        return torch.ones(len(rows), dtype=torch.bool)
    return rows.isfinite().all(1)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of float32 or bfloat16, of any shape, holds finite numbers alone."""
    return bool(finite_rows(tensor.reshape(-1, tensor.shape[-1])).all())
