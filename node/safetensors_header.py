"""Where the tensors of a safetensors file lie: its header, read and checked, and not a byte of weights. No torch.

The format: 8 bytes little-endian length, that many bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.errors import BadRequest
from mesh.weights import DTYPE_BYTES, TensorEntry

MAX_HEADER_BYTES = 100 << 20  # the format's own limit
ALIGNMENT_BYTES = 8  # of the data, by the format's advice


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the file, by name.

    Raises:
        BadRequest: not a safetensors file, damaged or cut short.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        file_bytes = path.stat().st_size
        size_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= size_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise BadRequest(f"{path.name} is not a safetensors file or is cut short; download it again", "model")
        raw = file.read(size_bytes)
    try:
        header: dict[str, Any] = json.loads(raw)
        return {name: _stored(entry, 8 + size_bytes, file_bytes) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, LookupError, AttributeError):
        raise BadRequest(f"the header of {path.name} is damaged, or the file cut short; download it again", "model") from None


def _stored(entry: Mapping[str, Any], data_at: int, file_bytes: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= file_bytes - data_at:
        raise ValueError("data outside the file")
    return StoredTensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), data_at + begin, end - begin)


def weight_files(directory: Path) -> list[Path]:
    """The files that the weights are in: those that the index names, else `model.safetensors`, else all there are.

    A hub download may hold the same weights twice, in one file of another form beside the parts.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, LookupError, AttributeError, TypeError):
            raise BadRequest(f"{index.name} of {directory.name} is damaged; download it again", "model") from None
        return [directory / name for name in named]
    whole = directory / "model.safetensors"
    return [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))


def make_header(tensors: Iterable[TensorEntry]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of these tensors, and each one's offset in that file; the data follow in this order."""
    entries: dict[str, Any] = {}
    position = 0
    for tensor in tensors:
        end = position + tensor.size_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % ALIGNMENT_BYTES)
    head = struct.pack("<Q", len(raw)) + raw
    return head, {name: len(head) + entry["data_offsets"][0] for name, entry in entries.items()}


def is_whole(stored: StoredTensor) -> bool:
    """Whether dtype, shape and size say the same."""
    return stored.dtype in DTYPE_BYTES and stored.elements * DTYPE_BYTES[stored.dtype] == stored.size_bytes
