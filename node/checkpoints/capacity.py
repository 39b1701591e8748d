"""How many layers of a model this machine can hold: from the checkpoint's headers, before a byte of weights is read."""

from __future__ import annotations

import math
from pathlib import Path

import psutil

from node.checkpoints.safetensors_header import read_header, weight_files

WEIGHTS_SHARE = 0.75  # of the node's memory; the rest is for KV caches
BYTES_PER_PARAMETER = 4.0  # float32, the widest dtype a CPU node may choose
PACKING = 1.25  # packed copies are made layer by layer beside the originals


def memory_budget_bytes(configured: int | None) -> int:
    """What `--memory` says, else half of what is free now."""
    return configured if configured is not None else psutil.virtual_memory().available // 2


def parameters(directory: Path) -> int:
    """Parameters of the checkpoint, by its safetensors headers."""
    return sum(tensor.elements for file in weight_files(directory) for tensor in read_header(file).values())


def layers_that_fit(directory: Path, layers: int, memory_bytes: int) -> int:
    """Decoder layers whose weights fit into the weights' share of `memory_bytes`; embeddings count as spread over the layers."""
    return layers_within(parameters(directory), layers, memory_bytes)


def needed_mib(directory: Path, models: int) -> int:
    """The `--memory` in MiB with which all layers of the checkpoint fit, beside other models: one of `models` equal shares."""
    weights_bytes = parameters(directory) * BYTES_PER_PARAMETER * PACKING
    return math.ceil(weights_bytes / WEIGHTS_SHARE * models / (1 << 20)) + 1


def layers_within(parameters: int, layers: int, memory_bytes: int) -> int:
    """As `layers_that_fit`, of a model of so many parameters."""
    bytes_per_layer = parameters * BYTES_PER_PARAMETER * PACKING / max(layers, 1)
    if bytes_per_layer == 0:
        return layers
    return min(layers, math.floor(WEIGHTS_SHARE * memory_bytes / bytes_per_layer))
