"""Copies between host and device through a ring of pinned buffers, so that a copy runs while the next step is planned.

A buffer is written again only after the copy out of it has ended: each has a fence in the device's queue behind the copy.
On the CPU the same code runs, without pinned memory and without waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

BUFFERS = 3  # a step's numbers, its activations, and the next step's numbers


class Fence(Protocol):
    """A point in the device's queue behind a copy."""

    def mark(self) -> None:
        """Puts the point at the end of the queue."""

    def wait(self) -> None:
        """Waits until the device has passed the last mark; returns at once where there is none."""


class NoFence:
    """For the CPU, where a copy has ended when its call returns."""

    def mark(self) -> None: ...

    def wait(self) -> None: ...


class CudaFence:
    """A CUDA event."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event()
        self._device = device

    def mark(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._event.synchronize()


class Staging:
    """The buffers of one stage. One thread at a time may use them."""

    def __init__(self, device: torch.device, fence: Callable[[], Fence] | None = None) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        make = fence or ((lambda: CudaFence(device)) if self._pinned else NoFence)
        self._fences = [make() for _ in range(BUFFERS)]
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(BUFFERS)]
        self._next = 0

    def to_device(self, source: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """Copies `source` to the device; returns the copy, which is `into` if given (of the same shape and dtype)."""
        assert into is None or (into.shape, into.dtype) == (source.shape, source.dtype)
        index = self._next
        self._next = (index + 1) % BUFFERS
        self._fences[index].wait()
        if self._buffers[index].numel() < source.nbytes:
            self._buffers[index] = torch.empty(2 * source.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        staged = self._buffers[index][: source.nbytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device) if into is None else into
        target.copy_(staged, non_blocking=True)
        self._fences[index].mark()
        return target

    def to_host(self, source: torch.Tensor) -> torch.Tensor:
        """Returns a copy of `source` in host memory, which the caller may keep; torch caches the pinned memory."""
        if not self._pinned:
            return source.clone()
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return target
