"""The CPU's kind and instructions, the linear kernels for it, and the numerics fingerprint. The CPU is read once a process."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

import torch

from node.engine import device
from node.engine.kernels import golden
from node.engine.kernels.kernel_probe import refusal
from node.engine.model.linear import KERNELS, Kernel
from node.engine.native.library import native

RULES_VERSION = 5  # of the exactness rules: rows in buckets, query rows by 8, KV by 128, the sampler, compiled layers


@functools.cache
def isa() -> str:
    """Returns the vector instructions that torch may use here, e.g. `AVX512+bf16+vnni+amx`.

    The extensions are read from the CPU and belong to AVX-512: with a lower ATEN_CPU_CAPABILITY they do not count.
    """
    name: str = torch.backends.cpu.get_cpu_capability()
    if name != "AVX512":
        return name
    checks = {"bf16": "_is_avx512_bf16_supported", "vnni": "_is_vnni_supported", "amx": "_is_amx_tile_supported"}
    found = [short for short, check in checks.items() if getattr(torch.cpu, check, lambda: False)()]
    return "+".join([name, *found])


@functools.cache
def cpu() -> str:
    """Returns the kind of CPU: vendor, family and model where the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    fields = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    return " ".join([platform.machine(), *(fields[name] for name in names if name in fields)])


def fingerprint(
    weights: str, kernel: Kernel, threads: int, ranks: int = 1, on: torch.device = device.CPU, constants_digest: str = ""
) -> str:
    """Returns a digest of everything that is known to change a bit, in 16 hex digits: equal ones promise equal tokens.

    `constants_digest` is that of a span whose layers are compiled (`NativeLayers`). Such a span computes the same bits on
    every machine on which the golden vectors hold; otherwise torch and the CPU decide bits too. Where several ranks compute
    a span together, `-tp` and their number follow the digits, for sums over several parts round differently.
    """
    assert threads > 0 and ranks > 0
    parts: tuple[object, ...] = (str(kernel.dtype), kernel.quantize, RULES_VERSION, weights)
    if constants_digest and golden.holds():
        parts = (*parts, golden.GOLDEN, constants_digest)
    else:
        parts = (*parts, torch.__version__, isa(), cpu(), kernel.name, threads)
    if on != device.CPU:
        parts = (*parts, device.name(on))
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()
    return digest if ranks == 1 else f"{digest}-tp{ranks}"


def named(kernel: Kernel) -> str:
    """Describes a kernel with the instructions that it uses, e.g. `mesh-bf16 on amx`; for torch's kernels, those allowed."""
    if kernel.attention:
        return f"{kernel.name}, attention {kernel.attention}"
    library = native() if kernel.compiled else None
    return f"{kernel.name} on {isa() if library is None else library.isa.name.lower()}"


def candidates(wanted: str, stored: torch.dtype, quantize: str = "none") -> list[Kernel]:
    """Returns kernels for a checkpoint stored as `stored`, the preferred one first. `wanted`: a dtype, kernel or "auto".

    The first is the compiled kernel whose rows have the stored dtype: its bits are the same on every CPU, so all nodes
    that have it choose alike (docs/decisions/0033). Where it could not be built a rule of thumb decides: without bf16
    instructions bf16 arithmetic is several times slower than fp32, and FBGEMM reads half the bytes of fp32. Weights are
    rounded only on request.

    Raises:
        ValueError: no such dtype or kernel, or this machine has none of them; the message gives each one's reason.
    """
    if wanted in KERNELS:
        if KERNELS[wanted].attention:
            raise ValueError(f"{wanted} computes on a GPU; it needs --device cuda")
        if quantize not in ("none", KERNELS[wanted].quantize):
            raise ValueError(f"{wanted} does not hold weights as {quantize}; leave out --quantize or --dtype")
        return _existing([wanted])
    if wanted not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"expected auto, float32, bfloat16 or one of {', '.join(KERNELS)}; got {wanted!r}")
    wide = wanted == "float32" or (wanted == "auto" and stored is not torch.bfloat16)
    if quantize == "int8":
        return _existing(["mesh-int8-fp32", "mesh-int8", "aten-int8"] if wide else ["mesh-int8", "aten-int8"])
    if quantize == "int4":
        return _existing(["mesh-int4-fp32"] if wide else ["mesh-int4"])
    if wanted == "bfloat16":
        return _existing(["mesh-bf16", "onednn-bf16", "aten-bf16"])
    if wanted == "float32" or stored is torch.float32:
        return _existing(["mesh-fp32", "onednn-fp32", "aten-fp32"])
    if stored is torch.float16:
        return _existing(["mesh-fp32", "fbgemm-fp16", "onednn-fp32", "aten-fp32"])
    others = ["onednn-bf16", "fbgemm-fp16"] if "bf16" in isa() or "amx" in isa() else ["fbgemm-fp16", "onednn-bf16"]
    return _existing(["mesh-bf16", "mesh-fp32", *others, "onednn-fp32", "aten-fp32"])


def gpu_candidates(wanted: str, stored: torch.dtype) -> list[Kernel]:
    """As `candidates`, for a GPU: products are torch's own, and what differs is the attention.

    Raises:
        ValueError: no such dtype or kernel.
    """
    names = [kernel.name for kernel in KERNELS.values() if kernel.attention]
    if wanted in names:
        return [KERNELS[wanted]]
    if wanted not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"expected auto, float32, bfloat16 or one of {', '.join(names)} on a GPU; got {wanted!r}")
    wide = wanted == "float32" or (wanted == "auto" and stored is not torch.bfloat16)
    return [kernel for kernel in map(KERNELS.__getitem__, names) if (kernel.dtype is torch.float32) == wide]


def _existing(names: list[str]) -> list[Kernel]:
    found = [KERNELS[name] for name in names if not refusal(KERNELS[name])]
    if not found:
        reasons = "; ".join(f"{name}: {refusal(KERNELS[name])}" for name in names)
        raise ValueError(f"this machine cannot compute with {reasons}")
    return found
