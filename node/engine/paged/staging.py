"""The way to and from the device: through pinned buffers that take turns, so that a copy runs while the next step is planned.

A buffer is written again only when the copy out of it is over: each has a fence, which the device passes behind the copy.
On the CPU there is nothing to wait for and nothing to pin, and the same code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

BUFFERS = 3  # a step's numbers, its activations, and the next step's numbers


class Fence(Protocol):
    """Stands behind a copy in the device's queue."""

    def mark(self) -> None: ...

    def wait(self) -> None:
        """Until the device has passed the last mark; at once where there is none."""


class NoFence:
    """On the CPU a copy is over when its call returns."""

    def mark(self) -> None: ...

    def wait(self) -> None: ...


class CudaFence:
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event()
        self._device = device

    def mark(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._event.synchronize()


class Staging:
    """For one thread at a time."""

    def __init__(self, device: torch.device, fence: Callable[[], Fence] | None = None) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        make = fence or ((lambda: CudaFence(device)) if self._pinned else NoFence)
        self._fences = [make() for _ in range(BUFFERS)]
        self._allocator = [torch.empty(0, dtype=torch.uint8) for _ in range(BUFFERS)]
        self._next = 0

    def up(self, source: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of `source` on the device, in `into` where that is given (of its shape and dtype)."""
        turn = self._next
        self._next = (turn + 1) % BUFFERS
        self._fences[turn].wait()
        if self._allocator[turn].numel() < source.nbytes:
            self._allocator[turn] = torch.empty(2 * source.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        staged = self._allocator[turn][: source.nbytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device) if into is None else into
        target.copy_(staged, non_blocking=True)
        self._fences[turn].mark()
        return target

    def down(self, source: torch.Tensor) -> torch.Tensor:
        """A copy of `source` in the host's memory, which the caller may keep; torch keeps pinned memory for the next one."""
        if not self._pinned:
            return source.clone()
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return target
