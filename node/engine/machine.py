"""What the CPU can do, and which linear kernel that speaks for. Read once a process."""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from pathlib import Path

import torch

from node.engine.linear import KERNELS, Kernel

RULES_VERSION = 2  # of the exactness rules: rows in buckets, query rows by 8, KV by 128, rounding of the sampler, lean layers
DECISIVE = 1.5  # a timing overrules the rule of thumb only by this factor: two nodes of one kind must choose alike
WORTH_TIMING_BYTES = 8 << 20  # smaller layers live in caches, where timings say little and matter less


@functools.cache
def isa() -> str:
    """The vector instructions that torch may use here, e.g. `AVX512+bf16+vnni+amx`."""
    name = torch.backends.cpu.get_cpu_capability()
    checks = {"bf16": "_is_avx512_bf16_supported", "vnni": "_is_vnni_supported", "amx": "_is_amx_tile_supported"}
    found = [short for short, check in checks.items() if getattr(torch.cpu, check, lambda: False)()]
    return "+".join([name, *found])


@functools.cache
def cpu() -> str:
    """The kind of CPU, as kernels tell kinds apart: vendor, family and model where the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    said = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    wanted = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    return " ".join([platform.machine(), *(said[name] for name in wanted if name in said)])


def fingerprint(weights: str, kernel: Kernel, threads: int) -> str:
    """Equal fingerprints promise equal tokens: all that is known to change a bit, in 16 hex digits."""
    parts = (torch.__version__, isa(), cpu(), str(kernel.dtype), kernel.name, "none", RULES_VERSION, weights, threads)
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def candidates(wanted: str, stored: torch.dtype) -> list[Kernel]:
    """Kernels for a checkpoint stored as `stored`, by rule of thumb the best first. `wanted`: a dtype, kernel or "auto".

    Nothing is rounded that the checkpoint holds exactly, unless it was asked for. Without bf16 instructions bf16
    arithmetic is several times slower than fp32, while FBGEMM reads half the bytes of fp32 and rounds less than bf16.

    Raises:
        ValueError: no such dtype or kernel.
    """
    names = {
        "float32": ["onednn-fp32", "aten-fp32"],
        "bfloat16": ["onednn-bf16", "aten-bf16"],
    }
    if wanted in KERNELS:
        return [KERNELS[wanted]]
    if wanted in names:
        return [KERNELS[name] for name in names[wanted]]
    if wanted != "auto":
        raise ValueError(f"expected auto, float32, bfloat16 or one of {', '.join(KERNELS)}; got {wanted!r}")
    if stored is torch.bfloat16:
        fast = "bf16" in isa() or "amx" in isa()
        order = ["onednn-bf16", "fbgemm-fp16"] if fast else ["fbgemm-fp16", "onednn-bf16"]
        return [KERNELS[name] for name in (*order, "onednn-fp32", "aten-fp32")]
    if stored is torch.float16:
        return [KERNELS[name] for name in ("fbgemm-fp16", "onednn-fp32", "aten-fp32")]
    return [KERNELS[name] for name in names["float32"]]


@functools.cache
def ranked(wanted: str, stored: torch.dtype, inputs: int, outputs: int) -> list[Kernel]:
    """The candidates, the fastest on a layer of this shape first where it is decisively so."""
    kernels = candidates(wanted, stored)
    if len(kernels) == 1 or inputs * outputs * stored.itemsize < WORTH_TIMING_BYTES:
        return kernels
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(7)) / inputs**0.5
    times_s = {kernel.name: _decode_time_s(kernel, weight) for kernel in kernels}
    fastest = min(kernels, key=lambda kernel: times_s[kernel.name])
    if times_s[kernels[0].name] < DECISIVE * times_s[fastest.name]:
        return kernels
    return [fastest, *(kernel for kernel in kernels if kernel is not fastest)]


def _decode_time_s(kernel: Kernel, weight: torch.Tensor) -> float:
    """Geometric middle of the best times for 2 and 16 rows; infinite where the kernel does not exist."""
    try:
        product = kernel.pack(weight.to(kernel.dtype), None)
        squared = 1.0
        for count in (2, 16):
            rows = torch.ones(count, weight.shape[1], dtype=kernel.dtype)
            product(rows)
            best_s = float("inf")
            for _ in range(5):
                began_s = time.perf_counter()
                product(rows)
                best_s = min(best_s, time.perf_counter() - began_s)
            squared *= best_s
    except (RuntimeError, ValueError, NotImplementedError):
        return float("inf")
    return squared**0.5
