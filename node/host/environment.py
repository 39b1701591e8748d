"""Reads the environment of the node's process: the only file of a node that does.

Directories by the XDG convention, caps on the CPU's vector instructions, and the environment of child processes.
"""

from __future__ import annotations

import os
from pathlib import Path

from mesh.errors import BadRequest

CPU_ISA_VARIABLE = "MESH_CPU_ISA"
CPU_ISAS = ("none", "avx2", "avx512", "amx")


def data_home() -> Path:
    """Where nodes keep what must survive a restart, by the XDG convention."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "gossip-mesh"


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a process that this one starts: its own, with these changes."""
    return {**os.environ, **changes}


def onednn_cap() -> str:
    """The most instructions that the environment lets oneDNN use; empty where it sets no cap. oneDNN reads it itself."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "")


def cache_home() -> Path:
    """Where a node keeps what it can make again (the default model)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gossip-mesh"


def cpu_isa() -> str:
    """The most of the CPU's vector instructions that the compiled kernel may use, one of `CPU_ISAS`; `none`: do without it.

    Read from the environment, so that every process of a node, and every test, goes by it. Torch has variables of its own:
    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA.

    Raises:
        BadRequest: another word.
    """
    wanted = os.environ.get(CPU_ISA_VARIABLE) or CPU_ISAS[-1]
    if wanted not in CPU_ISAS:
        raise BadRequest(f"{CPU_ISA_VARIABLE}: expected {', '.join(CPU_ISAS[:-1])} or {CPU_ISAS[-1]}, got {wanted!r}", "cpu_isa")
    return wanted
