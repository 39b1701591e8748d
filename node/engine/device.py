"""Chooses the device that computes: the CPU, or one CUDA GPU. `--device auto` means the CPU until the GPU path has run on a GPU.

Stage, scheduler and rules of exactness are the same for both; the differences are in `node/engine/paged`. Features that the GPU
path lacks are refused here by name, before anything is loaded.
"""

from __future__ import annotations

import re

import torch

from mesh.errors import BadRequest

CPU = torch.device("cpu")
MEMORY_SHARE = 0.25  # of a GPU's free memory, for keys and values; the weights come first
_OPTION = re.compile(r"auto|cpu|cuda(?::\d{1,2})?")


def select(option: str) -> torch.device:
    """Returns the device that `--device` names.

    Raises:
        BadRequest: the option has another form, or there is no such GPU.
    """
    if not _OPTION.fullmatch(option):
        raise BadRequest(f"--device: expected auto, cpu, cuda or cuda:N, got {option!r}", param="device")
    if not option.startswith("cuda"):
        return CPU
    if torch.version.cuda is None:
        raise BadRequest(
            f"--device {option}: this torch ({torch.__version__}) is built for CPUs alone; install a CUDA build of the same "
            "version, or take --device cpu",
            param="device",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", int(option.partition(":")[2] or 0))
    if device.index >= count:
        visible = f"only {count} GPUs are" if count else "no GPU is"
        raise BadRequest(f"--device {option}: {visible} visible here; take --device cpu", param="device")
    return device


def require_servable(device: torch.device, name: str, mixture: bool, quantize: str, ranks: int) -> None:
    """Raises BadRequest, with the name of the feature, if the GPU path cannot compute the model as configured."""
    if device == CPU:
        return
    unsupported = {
        "mixtures of experts": mixture,
        f"{quantize} weights": quantize != "none",
        "--tensor-parallel": ranks > 1,
    }
    for feature, requested in unsupported.items():
        if requested:
            raise BadRequest(
                f"{name}: {feature} can be computed on CPUs only so far; take --device cpu", "device", "model_not_servable"
            )


def configure_precision(device: torch.device) -> None:
    """Sets full float32 arithmetic, and float32 sums of bfloat16 products: torch rounds more by default."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def name(device: torch.device) -> str:
    """Returns what a GPU's arithmetic may depend on: model, architecture and CUDA version; empty for the CPU (see `machine`)."""
    if device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm{major}{minor} cuda{torch.version.cuda}"


def kv_bytes(device: torch.device, configured: int | None, otherwise: int) -> int:
    """Returns the bytes for keys and values: `configured` or else `otherwise`; on a GPU at most a share of its free memory."""
    size = otherwise if configured is None else configured
    if device.type != "cuda":
        return size
    share = int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
    return share if configured is None else min(configured, share)
