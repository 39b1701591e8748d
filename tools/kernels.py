"""What this machine computes with, as plain lines: `python -m tools.kernels`. `make test` prints it before each of its modes."""

from __future__ import annotations

import subprocess

import torch

from bench.machine import machine
from node.engine.kernels.kernel_probe import refusal
from node.engine.kernels.machine import isa
from node.engine.model.linear import KERNELS
from node.engine.native.build import Compiler, compilers
from node.engine.native.library import absence, native


def report() -> list[str]:
    """CPU, instructions, compiler, and every kernel for CPUs: whether it runs here, and if not why."""
    about = machine()
    library = native()
    found = [_version(compiler) for compiler in compilers()]
    kernels = [kernel for kernel in KERNELS.values() if not kernel.attention]
    refused = {kernel.name: refusal(kernel) for kernel in kernels}
    lines = [
        f"CPU: {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB",
        f"torch {torch.__version__} uses {isa()}",
        f"C compilers: {', '.join(found) or 'none'}",
        f"compiled kernel: {f'none ({absence()})' if library is None else f'on {library.isa.name.lower()}'}",
        f"kernels that run: {', '.join(name for name, reason in refused.items() if not reason)}",
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        if reason:
            reasons.setdefault(reason, []).append(name)
    return lines + [f"kernels that do not: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _version(compiler: Compiler) -> str:
    said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0] or " ".join(compiler)


if __name__ == "__main__":
    print("\n".join(report()))
