"""Caps every engine of a benchmark to AVX2, so that figures for machines that have no more can be had on one that has.

torch, oneDNN and the compiled kernel read their caps from the environment when they are loaded, so the process replaces
itself once with the environment set; child processes inherit it. FBGEMM is told by a call.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch

from node.engine.native.library import native

ISAS = ("native", "avx2")
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "MESH_CPU_ISA": "avx2",
}
FBGEMM_AVX2 = 1  # fbgemm::inst_set_t
FBGEMM_FORCE, FBGEMM_NOW = "_ZN6fbgemm14fbgemmForceIsaENS_10inst_set_tE", "_ZN6fbgemm20fbgemmInstructionSetEv"


def cap(isa: str) -> dict[str, Any]:
    """What was capped, for the report; empty for `native`. Replaces the process when its environment is not yet set."""
    if isa == "native":
        return {}
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        sys.stderr.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ENVIRONMENT})
    library = native()
    return {
        "to": isa,
        "environment": ENVIRONMENT,
        "compiled_kernel": "none" if library is None else library.isa.name.lower(),
        "torch": torch.backends.cpu.get_cpu_capability(),
        "fbgemm": "avx2" if cap_fbgemm() else "not capped: this torch does not export fbgemmForceIsa",
    }


def cap_fbgemm() -> bool:
    """FBGEMM reads no variable; the function that its own benchmarks use is exported from torch's library."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(path))
        force, now = getattr(loaded, FBGEMM_FORCE), getattr(loaded, FBGEMM_NOW)
    except (OSError, AttributeError):
        return False
    force.argtypes, force.restype, now.restype = (ctypes.c_int,), None, ctypes.c_int
    force(FBGEMM_AVX2)
    return bool(now() == FBGEMM_AVX2)
