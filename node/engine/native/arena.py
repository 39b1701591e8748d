"""Allocates memory for packed weights, in mappings outside the heap, with large pages where the system has them.

A load allocates and frees much other memory, which would fragment a heap shared with weights. Small weights share one
mapping, for a weight smaller than a large page would get none: this makes reading them 2 to 10 % faster (one to eight rows of
bfloat16, on an EPYC). A mapping is freed with the last weight in it.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

ALIGNMENT = 64
SHARED_BYTES = 16 << 20  # the size of a shared mapping
MAX_SHARED_BYTES = 4 << 20  # a larger weight has a mapping of its own


class _Shared:
    """The mapping in which the next small weight is allocated."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        self._used = 0

    def take(self, size_bytes: int) -> torch.Tensor:
        with self._lock:
            if self._mapping is None or self._used + size_bytes > SHARED_BYTES:
                self._mapping, self._used = mapped(SHARED_BYTES), 0
            taken = torch.frombuffer(self._mapping, dtype=torch.uint8, offset=self._used, count=size_bytes)
            self._used += -(-size_bytes // ALIGNMENT) * ALIGNMENT
            return taken


_shared = _Shared()


def zeroed(size_bytes: int) -> torch.Tensor:
    """Returns zeros `[size_bytes]` uint8, aligned to a cache line; `size_bytes` is above zero."""
    assert size_bytes > 0
    if size_bytes > MAX_SHARED_BYTES:
        return torch.frombuffer(mapped(size_bytes), dtype=torch.uint8)
    return _shared.take(size_bytes)


def mapped(size_bytes: int) -> mmap.mmap:
    """Returns a mapping of zeros, resident only where it is written, in large pages where the system has them."""
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # another system than Linux; a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
