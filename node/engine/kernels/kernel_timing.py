"""Measures how long each kernel takes for a layer's product on this machine, in CPU time, which other load disturbs little.

One thread computes, and its own CPU time is read, which excludes the time of other processes and of waiting. In each round
every kernel is measured once, so that a slow period concerns all of them. Disturbances only add time, so the minimum over
the rounds counts, and rounds go on until every kernel has reached its minimum twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from node.engine.model.linear import Kernel, Rows

ROWS = (2, 16)  # as in decoding with few and with many sequences
MIN_ROUNDS, MAX_ROUNDS = 5, 25
STEADY = 1.1  # the second smallest time is at most so many times the smallest

Take = Callable[[str, int], float]
"""CPU seconds of one product of the named kernel with that many rows."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Minimum CPU seconds of one product for each of `ROWS`, by kernel name; empty for a kernel that cannot compute here."""

    times_s: dict[str, tuple[float, ...]]
    steady: bool
    """Whether each minimum was reached twice; if not, the machine was too busy."""


def rounds(names: Sequence[str], take: Take) -> Timings:
    """Measures the named kernels in rounds until their timings are steady, at most MAX_ROUNDS."""
    taken: dict[tuple[str, int], list[float]] = {(name, count): [] for name in names for count in ROWS}
    steady = False
    for number in range(1, MAX_ROUNDS + 1):
        for (name, count), times_s in taken.items():
            times_s.append(take(name, count))
        steady = number >= MIN_ROUNDS and all(map(_shown_twice, taken.values()))
        if steady:
            break
    return Timings({name: tuple(min(taken[name, count]) for count in ROWS) for name in names}, steady)


def _shown_twice(times_s: list[float]) -> bool:
    least, second = sorted(times_s)[:2]
    return second <= STEADY * least


def of_layer(kernels: Sequence[Kernel], stored: torch.dtype, inputs: int, outputs: int) -> Timings:
    """Measures the kernels on a random layer whose weight is stored as `stored`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        numbers = torch.Generator().manual_seed(7)
        weight = (torch.randn(outputs, inputs, generator=numbers) / inputs**0.5).to(stored)
        products: dict[str, Rows] = {}
        rows: dict[tuple[str, int], torch.Tensor] = {}
        for kernel in kernels:
            given = {count: torch.randn(count, inputs, generator=numbers).to(kernel.dtype) for count in ROWS}
            try:
                product = kernel.pack(weight if kernel.compiled else weight.to(kernel.dtype), None)
                for some in given.values():
                    product(some)  # the first call allocates the kernel's buffers
            except (RuntimeError, ValueError, NotImplementedError):  # no such kernel on this CPU, or not for such weights
                continue
            products[kernel.name] = product
            rows |= {(kernel.name, count): some for count, some in given.items()}
        timed = rounds(list(products), lambda name, count: _cpu_s(products[name], rows[name, count]))
        return Timings({kernel.name: timed.times_s.get(kernel.name, ()) for kernel in kernels}, timed.steady)
    finally:
        torch.set_num_threads(threads)


def _cpu_s(product: Rows, rows: torch.Tensor) -> float:
    began_s = time.thread_time()
    product(rows)
    return time.thread_time() - began_s
