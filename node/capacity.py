"""How many layers of a model this machine can hold: from the checkpoint's headers, before a byte of weights is read."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import psutil

WEIGHTS_SHARE = 0.75  # of the node's memory; the rest is for KV caches
BYTES_PER_PARAMETER = 4.0  # float32, the widest dtype a CPU node may choose
PACKING = 1.25  # packed copies are made layer by layer beside the originals
HEADER_LIMIT_BYTES = 64 << 20


def memory_budget_bytes(configured: int | None) -> int:
    """What `--memory` says, else half of what is free now."""
    return configured if configured is not None else psutil.virtual_memory().available // 2


def parameters(directory: Path) -> int:
    """Parameters of the checkpoint, by its safetensors headers."""
    return sum(_parameters_of(file) for file in sorted(directory.glob("*.safetensors")))


def layers_that_fit(directory: Path, layers: int, memory_bytes: int) -> int:
    """Decoder layers whose weights fit into the weights' share of `memory_bytes`; embeddings count as spread over the layers."""
    bytes_per_layer = parameters(directory) * BYTES_PER_PARAMETER * PACKING / max(layers, 1)
    if bytes_per_layer == 0:
        return layers
    return min(layers, math.floor(WEIGHTS_SHARE * memory_bytes / bytes_per_layer))


def _parameters_of(file: Path) -> int:
    with open(file, "rb") as opened:
        (header_bytes,) = struct.unpack("<Q", opened.read(8))
        if header_bytes > HEADER_LIMIT_BYTES:
            return 0
        header = json.loads(opened.read(header_bytes))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
