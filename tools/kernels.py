"""What this machine computes with, as plain lines: `python -m tools.kernels`. `make test` prints it before each of its modes."""

from __future__ import annotations

import shutil

import torch

from bench.machine import machine
from node.engine.kernel_probe import refusal
from node.engine.linear import KERNELS
from node.engine.machine import isa
from node.engine.native.build import COMPILERS
from node.engine.native.library import absence, native


def report() -> list[str]:
    """CPU, instructions, compiler, and every kernel for CPUs: whether it runs here, and if not why."""
    about = machine()
    library = native()
    compilers = [name for name in COMPILERS if shutil.which(name)]
    kernels = [kernel for kernel in KERNELS.values() if not kernel.attention]
    refused = {kernel.name: refusal(kernel) for kernel in kernels}
    lines = [
        f"CPU: {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB",
        f"torch {torch.__version__} uses {isa()}",
        f"C compilers: {', '.join(compilers) or 'none of ' + ', '.join(COMPILERS)}",
        f"compiled kernel: {f'none ({absence()})' if library is None else f'on {library.isa.name.lower()}'}",
        f"kernels that run: {', '.join(name for name, reason in refused.items() if not reason)}",
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        if reason:
            reasons.setdefault(reason, []).append(name)
    return lines + [f"kernels that do not: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


if __name__ == "__main__":
    print("\n".join(report()))
