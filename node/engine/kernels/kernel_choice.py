"""Chooses the kernel of a span: the preferred one, unless another is faster by a large margin.

The compiled kernels are *portable*: the same bits on every CPU and with any number of threads. Others round as this CPU
does, so a node that uses one is exact only with nodes of the same kind. Another kernel therefore replaces a portable one
only where it is PORTABLE_MARGIN times as fast, and a kernel that is not portable by MARGIN, for two machines of one kind
must choose alike. The reasons for these numbers are in docs/decisions/0033.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from node.engine.kernels import kernel_record, kernel_timing, machine
from node.engine.kernels.kernel_timing import Timings
from node.engine.model.linear import KERNELS, Kernel
from node.engine.native.build import sources_digest
from node.engine.native.library import absence, native
from node.host.environment import cache_home, onednn_cap
from node.host.uncompiled import BY_NAME

RULES_VERSION = 1  # of how kernels are timed: timings of another version are measured anew
PORTABLE_MARGIN = 4.0
MARGIN = 2.0
REASON_LETTERS = 300
MIN_TIMED_BYTES = 8 << 20  # smaller layers stay in caches, where timings vary and matter little


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels to try, in this order, and the reason; for a loaded span, the one kernel that computes it."""

    kernels: tuple[Kernel, ...]
    reason: str
    times_us: Mapping[str, float] = field(default_factory=dict)
    """CPU microseconds of one product of the widest layer in one thread, between 2 and 16 rows; empty: not timed."""
    remembered: bool = False


def uncompiled(choices: Iterable[KernelChoice]) -> str:
    """Returns why one of the choices is a CPU kernel other than the compiled one; empty where none is."""
    for choice in choices:
        if not (choice.kernels[0].compiled or choice.kernels[0].attention):
            return absence() or choice.reason[:REASON_LETTERS]
    return ""


@functools.cache
def choose(wanted: str, stored: torch.dtype, inputs: int, outputs: int, quantize: str = "none") -> KernelChoice:
    """Chooses kernels for a model whose widest layer has this shape. `wanted`: a dtype, a kernel or "auto".

    Raises:
        ValueError: no such dtype or kernel, or this machine has none of them.
    """
    kernels = tuple(machine.candidates(wanted, stored, quantize))
    if wanted in KERNELS:
        return KernelChoice(kernels, BY_NAME)
    if len(kernels) == 1:
        return KernelChoice(kernels, "no other kernel here computes in this type")
    if inputs * outputs * stored.itemsize < MIN_TIMED_BYTES:
        return KernelChoice(kernels, f"{_preferred(kernels[0])}; layers this small are not timed")
    names = [kernel.name for kernel in kernels]
    timings, remembered = kernel_record.timings(
        cache_home() / "kernel-timings",
        _key(stored, inputs, outputs, names),
        names,
        lambda: kernel_timing.of_layer(kernels, stored, inputs, outputs),
    )
    return decided(kernels, timings, remembered)


def decided(kernels: Sequence[Kernel], timings: Timings, remembered: bool = False) -> KernelChoice:
    """Chooses the first kernel that no other beats by its margin; `kernels` in the order of preference."""
    times_us = {name: round(1e6 * math.prod(times) ** (1 / len(times)), 1) for name, times in timings.times_s.items() if times}
    if not timings.steady:
        reason = f"{_preferred(kernels[0])}; this machine was too busy to time kernels"
        return KernelChoice(tuple(kernels), reason, times_us, remembered)
    fastest = min(times_us, key=times_us.__getitem__, default="")
    able = [kernel for kernel in kernels if kernel.name in times_us]
    first = next((kernel for kernel in able if times_us[kernel.name] < _margin(kernel) * times_us[fastest]), kernels[0])
    order = (first, *(kernel for kernel in kernels if kernel is not first))
    passed_over = kernels[: kernels.index(first)]
    return KernelChoice(order, _reason(first, passed_over, times_us), times_us, remembered)


def _reason(first: Kernel, passed_over: Sequence[Kernel], times_us: Mapping[str, float]) -> str:
    if not passed_over:
        return f"{_preferred(first)}; no other is {_margin(first):g} times as fast"
    reasons = []
    for kernel in passed_over:
        if kernel.name not in times_us:
            reasons.append(f"{kernel.name} cannot compute such layers here")
        else:
            reasons.append(f"{kernel.name} takes {times_us[kernel.name] / times_us[first.name]:.1f} times as long")
    apart = "" if first.compiled else "; exact only with nodes of this kind of CPU"
    return ", ".join(reasons) + apart


def _preferred(kernel: Kernel) -> str:
    return "its bits are the same on every CPU" if kernel.compiled else "the first by rule of thumb, without a compiled kernel"


def _margin(kernel: Kernel) -> float:
    return PORTABLE_MARGIN if kernel.compiled else MARGIN


def _key(stored: torch.dtype, inputs: int, outputs: int, names: Sequence[str]) -> dict[str, str]:
    """Returns everything that a timing depends on."""
    library = native()
    return {
        "rules": str(RULES_VERSION),
        "cpu": machine.cpu(),
        "torch_instructions": machine.isa(),
        "onednn_cap": onednn_cap(),
        "compiled_for": "" if library is None else library.isa.name.lower(),
        "compiled_sources": "" if library is None else sources_digest(),
        "torch": torch.__version__,
        "stored": str(stored).removeprefix("torch."),
        "shape": f"{inputs} x {outputs}",
        "kernels": " ".join(names),
    }
