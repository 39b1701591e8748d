"""What went wrong in a step, told by the error: lack of memory ends one sequence, anything else the step's."""

from __future__ import annotations

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a GPU, or torch's CPU allocator (which says so in words alone) had no memory to give."""
    words = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error).lower() for word in words)
