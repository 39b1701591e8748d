"""Where a node computes: the CPU, or one CUDA GPU. `--device auto` is the CPU until the GPU path has been run on a GPU.

The same stage, scheduler and rules of exactness serve both; what differs is in `node/engine/paged`. What cannot be computed
on a GPU yet is refused here by name, before anything is loaded.
"""

from __future__ import annotations

import re

import torch

from mesh.errors import BadRequest

CPU = torch.device("cpu")
MEMORY_SHARE = 0.25  # of a GPU's free memory, for keys and values; the weights come first
_FORM = re.compile(r"auto|cpu|cuda(?::\d{1,2})?")


def chosen(wanted: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        BadRequest: it has another form, or there is no such GPU; with the reason.
    """
    if not _FORM.fullmatch(wanted):
        raise BadRequest(f"--device: expected auto, cpu, cuda or cuda:N, got {wanted!r}", param="device")
    if not wanted.startswith("cuda"):
        return CPU
    if torch.version.cuda is None:
        raise BadRequest(
            f"--device {wanted}: this torch ({torch.__version__}) is built for CPUs alone; install a CUDA build of the same "
            "version, or take --device cpu",
            param="device",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", int(wanted.partition(":")[2] or 0))
    if device.index >= count:
        there = f"only {count} GPUs are" if count else "no GPU is"
        raise BadRequest(f"--device {wanted}: {there} to be seen here; take --device cpu", param="device")
    return device


def require_servable(device: torch.device, name: str, mixture: bool, quantize: str, ranks: int) -> None:
    """Raises BadRequest: what the GPU path does not compute, by name."""
    if device == CPU:
        return
    lacking = {
        "mixtures of experts": mixture,
        f"{quantize} weights": quantize != "none",
        "--tensor-parallel": ranks > 1,
    }
    for what, wanted in lacking.items():
        if wanted:
            raise BadRequest(
                f"{name}: {what} can be computed on CPUs only so far; take --device cpu", "device", "model_not_servable"
            )


def prepare(device: torch.device) -> None:
    """Whole float32 arithmetic, and sums of bfloat16 products in float32: nothing is rounded without being asked for."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def name(device: torch.device) -> str:
    """What kind of device it is, as far as its arithmetic may depend on it; empty for the CPU, of which `machine` tells."""
    if device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm{major}{minor} cuda{torch.version.cuda}"


def kv_bytes(device: torch.device, configured: int | None, otherwise: int) -> int:
    """Bytes for keys and values: what is configured, on a GPU never more than a share of what it has free."""
    wanted = otherwise if configured is None else configured
    if device.type != "cuda":
        return wanted
    share = int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
    return share if configured is None else min(configured, share)
