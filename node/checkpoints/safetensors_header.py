"""Which files hold a model's tensors, and where each tensor lies in them: names and headers alone, no weights. No torch.

The format: 8 bytes little-endian length, that many bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.errors import BadRequest
from mesh.manifest import DTYPE_BYTES, TensorEntry

MAX_HEADER_BYTES = 100 << 20  # the format's own limit
ALIGNMENT_BYTES = 8  # of the data, by the format's advice
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20  # half a million tensors
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


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
        BadRequest: not a safetensors file, damaged, cut short, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            size_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= size_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise _refusal(f"{path.name} is not a safetensors file or is cut short; download it again")
            raw = file.read(size_bytes)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        header: dict[str, Any] = json.loads(raw)
        stored = {name: _stored(entry, 8 + size_bytes) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise _refusal(f"the header of {path.name} is damaged; download it again") from None
    expected = max((tensor.offset + tensor.size_bytes for tensor in stored.values()), default=0)
    if file_bytes < expected:
        raise _refusal(f"{path.name} is cut short: expected {expected} bytes, it has {file_bytes}; download it again")
    return stored


def _stored(entry: Mapping[str, Any], data_at: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError("no place in the file")
    shape = tuple(map(int, entry["shape"]))
    if any(size < 0 for size in shape):
        raise ValueError("a negative size")
    return StoredTensor(str(entry["dtype"]), shape, data_at + begin, end - begin)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses them: `model.safetensors`, else those that the index names.

    Without either, all safetensors files there are. A hub download may hold the same weights twice, in another form.

    Raises:
        BadRequest: a file is missing; the index is damaged or names a file outside the directory; no safetensors files.
    """
    whole, index = directory / WEIGHTS, directory / INDEX
    if whole.is_file():
        return [whole]
    if os.path.lexists(index):
        return _files_of_index(directory, index)
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        if not path.is_file():
            raise _refusal(f"{path.name} of {directory.name} leads to no file; download it again")
    _refuse_missing_shards(directory, files)
    if not files:
        raise _refusal(f"{directory.name} has no *.safetensors files; download the weights, or convert them with save_pretrained")
    return files


def _files_of_index(directory: Path, index: Path) -> list[Path]:
    files = sorted({name for name in read_index(index).values()})
    for name in files:
        if not (directory / name).is_file():
            raise _refusal(f"{name} is missing from {directory.name}, and {index.name} names it; download it again")
    return [directory / name for name in files]


def read_index(index: Path) -> dict[str, str]:
    """The index of a checkpoint in several files: tensor -> name of the file in the same directory.

    Raises:
        BadRequest: damaged, it cannot be read, or a name leads elsewhere.
    """
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("too large")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        named = {str(tensor): name for tensor, name in weight_map.items()}
    except OSError as error:
        raise unreadable(index, error) from None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise _refusal(f"{index.name} of {index.parent.name} is damaged; download it again") from None
    for name in set(map(str, named.values())):
        if not name.endswith(".safetensors") or name != Path(name).name or not name.isprintable():
            raise _refusal(
                f"{index.name} of {index.parent.name} names the file {name[:100]!r}; "
                "expected names of safetensors files in the same directory; download it again"
            )
    return named


def _refuse_missing_shards(directory: Path, files: Iterable[Path]) -> None:
    """Files that count themselves (`model-00001-of-00003.safetensors`) tell without an index which of them is missing."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for path in files:
        shard = _SHARD.fullmatch(path.name)
        if shard is not None:
            numbers.setdefault((shard["stem"], shard["count"]), set()).add(int(shard["number"]))
    for (stem, count), found in numbers.items():
        missing = next((number for number in range(1, int(count) + 1) if number not in found), None)
        if missing is not None:
            raise _refusal(
                f"{stem}-{missing:05d}-of-{count}.safetensors is missing from {directory.name}, whose other files "
                f"are of {int(count)}; download it again"
            )


def unreadable(path: Path, error: OSError) -> BadRequest:
    """The refusal of a file or directory that the operating system does not let this process read."""
    return _refusal(f"{path} cannot be read: {error.strerror or error}; check that it is there and that this user may read it")


def _refusal(message: str) -> BadRequest:
    return BadRequest(message, param="model", code="model_not_servable")


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
