"""A node without the compiled kernel: why, what that costs, and what to do, as the log, `mesh status` and `mesh doctor` say it.

The reasons travel in a node's facts (`mesh.view.Facts.uncompiled`), so that every node can tell them of every other.
"""

from __future__ import annotations

NO_COMPILER = "no C compiler"
COMPILER_FAILED = "the C compiler failed"
TURNED_OFF = "MESH_CPU_ISA is none"
BY_NAME = "asked for by its name"  # another kernel was (--dtype KERNEL)

# Measured (docs/decisions/0030): 100 million parameters, one thread, CPU time, with AVX-512 and with AVX2 alone.
COSTS = "a token of a lone answer takes 1.6 to 3 times the CPU time, and an answer that other nodes compute too is approximate"

_INSTALL = (
    "install one (Debian, Ubuntu: apt-get install gcc libc6-dev; Fedora: dnf install gcc; Arch: pacman -S gcc; openSUSE: zypper "
    "install gcc; or without root: pip install ziglang, into the environment that mesh runs in) and start the node again"
)
_REMEDIES = {
    NO_COMPILER: _INSTALL,
    COMPILER_FAILED: f"repair it (its headers are often missing: libc6-dev, glibc-devel) or {_INSTALL}",
    TURNED_OFF: "start the node without MESH_CPU_ISA=none",
    BY_NAME: "start the node without --dtype KERNEL",
}


def remedy(reason: str) -> str:
    """What to do about a node that gives this reason; empty where nothing can be done, as on another kind of processor."""
    return next((do for start, do in _REMEDIES.items() if reason.startswith(start)), "")
