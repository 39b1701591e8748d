"""How fast this machine reads memory: what a decoding step, which reads every weight once, can reach at best."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import torch

MEASURED_BYTES = 1 << 30
ABSENT = 1  # a byte that the buffer does not hold


class MemoryReader:
    """Reads one large buffer in two ways, as a sum and by libc's search for a byte; the faster one is the machine's."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._buffer = torch.zeros(MEASURED_BYTES // 4)
        self._find = ctypes.CDLL(None).memchr  # lets other threads run meanwhile
        self._find.argtypes, self._find.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
        self._pool = ThreadPoolExecutor(threads)
        self.best_gb_s = 0.0

    def measure(self) -> float:
        """GB/s of one more reading in either way, the faster; `best_gb_s` is the fastest so far."""
        fastest_s = min(self._sum_s(), self._search_s())
        read_gb_s = MEASURED_BYTES / fastest_s / 1e9
        self.best_gb_s = max(self.best_gb_s, read_gb_s)
        return read_gb_s

    def close(self) -> None:
        self._pool.shutdown()

    def _sum_s(self) -> float:
        began_s = time.perf_counter()
        self._buffer.sum()
        return time.perf_counter() - began_s

    def _search_s(self) -> float:
        share = MEASURED_BYTES // self._threads
        starts = [self._buffer.data_ptr() + number * share for number in range(self._threads)]
        began_s = time.perf_counter()
        found = list(self._pool.map(lambda start: self._find(start, ABSENT, share), starts))
        taken_s = time.perf_counter() - began_s
        if any(found):
            raise RuntimeError("a buffer of zeros held something else")
        return taken_s
