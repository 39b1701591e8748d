"""Where the tests of exactness compute, told in one place.

`MESH_TEST_DEVICE=cuda python -m pytest tests/engine/test_exactness.py tests/engine/test_paged_stage.py` runs them on a GPU.
On another device than the CPU the kernels are that device's; nothing else in the tests changes. A test that asks for a GPU
by name is skipped where there is none, with the reason that a node would give.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import BadRequest
from node.engine.device import CPU, select
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.model.local_stage import LocalStage
from node.engine.model.paged_stage import DeviceStage
from node.engine.paged.recorded import Recorder, cuda_graph, no_recording
from tests.engine.offered import offered

DEVICE = select(os.environ.get("MESH_TEST_DEVICE", "cpu"))


def kernels(*on_cpu: str) -> list[Any]:
    """Kernels as parameters of a test: the named ones on a CPU, all that are for GPUs on a GPU."""
    return offered(*on_cpu) if DEVICE == CPU else [kernel.name for kernel in KERNELS.values() if kernel.attention]


def no_gpu() -> str:
    """Why there is no GPU here; empty where there is one."""
    try:
        select("cuda")
    except BadRequest as error:
        return str(error)
    return ""


needs_gpu = pytest.mark.skipif(bool(no_gpu()), reason=no_gpu() or "there is a GPU")


def recorder() -> Recorder:
    return no_recording if DEVICE == CPU else cuda_graph(DEVICE)


def stage_on(directory: Path, start: int, end: int, kernel: str) -> LocalStage:
    """A packed stage on the device of the tests; a kernel for GPUs makes one with paged keys and values, on the CPU too."""
    checkpoint = read_checkpoint(directory)
    if KERNELS[kernel].attention:
        stage: LocalStage = DeviceStage(checkpoint, start, end, KERNELS[kernel], 1, device=DEVICE, record=recorder())
    else:
        stage = LocalStage(checkpoint, start, end, KERNELS[kernel], threads=1)
    stage.pack()
    return stage
