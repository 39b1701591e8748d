"""How long each kernel takes for a layer's product here, in CPU time, so that what else the machine does counts little.

One thread computes, and its own CPU time is read: it leaves out the time that other processes had, and says nothing of
threads that wait. Kernels take turns, round by round, so that a slow spell meets all of them. Interruptions only ever add
time, so the least of all rounds counts, and rounds go on until every kernel has shown its least time twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from node.engine.model.linear import Kernel, Rows

ROWS = (2, 16)  # as in decoding with few and with many sequences
MIN_ROUNDS, MAX_ROUNDS = 5, 25
STEADY = 1.1  # the second least time is at most so many times the least

Take = Callable[[str, int], float]
"""CPU seconds of one product of the named kernel with that many rows."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Least CPU seconds of one product for each of `ROWS`, by the kernel's name; empty for one that cannot compute here."""

    times_s: dict[str, tuple[float, ...]]
    steady: bool
    """Whether each of these was met twice; if not, the machine was too busy to tell."""


def rounds(names: Sequence[str], take: Take) -> Timings:
    """The named kernels' timings, from as many rounds as it takes until they are steady, at most MAX_ROUNDS."""
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
    """Times the kernels on a made-up layer whose weight is stored as `stored`."""
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
                    product(some)  # the first call makes what the kernel keeps
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
