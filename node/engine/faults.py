"""Detects the two faults of a step that end one sequence alone: lack of memory, and numbers that are not finite."""

from __future__ import annotations

import torch

BF16_EXPONENT_BITS = 0x7F80  # all of them are set in NaN and infinity, and in no other number


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether Python, torch on a GPU, or torch's CPU allocator (recognised by its message alone) found no memory."""
    messages = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(message in str(error).lower() for message in messages)


def finite_rows(rows: torch.Tensor) -> torch.Tensor:
    """Returns which rows of `[rows, width]`, float32 or bfloat16, hold finite numbers alone: bool `[rows]`, in one pass."""
    if rows.dtype is torch.bfloat16:
        return (rows.view(torch.int16) & BF16_EXPONENT_BITS).amax(1) < BF16_EXPONENT_BITS
    if bool(
        rows.sum(1).isfinite().all()
    ):  # a sum of finite numbers may overflow, but the sum is never finite where a number is not
        return torch.ones(len(rows), dtype=torch.bool)
    return rows.isfinite().all(1)


def all_finite(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor, float32 or bfloat16, of any shape, holds finite numbers alone."""
    return bool(finite_rows(tensor.reshape(-1, tensor.shape[-1])).all())
