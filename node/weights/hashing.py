"""From the files of a model directory to its manifest: every byte that decides what the model answers is hashed.

That is what a loader reads: the tensors of the safetensors files that the index names (else `model.safetensors`, else all),
and the text files that transformers looks for. Some threads hash side by side; they hold no lock that the node waits for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mesh.errors import BadRequest
from mesh.manifest import (
    DTYPE_BYTES,
    FORM,
    PIECE_BYTES,
    TEMPLATES_FOLDER,
    FileEntry,
    Manifest,
    TensorEntry,
    digest_of,
    is_text_file,
)
from node.checkpoints.safetensors_header import INDEX, StoredTensor, is_whole, read_header, weight_files
from node.weights.record import FileStamp, stamp_of

THREADS = min(4, os.cpu_count() or 1)  # a disk gives little more to more; each holds one piece
PIECES_AT_ONCE = 64  # between two looks at whether to stop
_NS_PER_S = 10**9


class HashingStopped(Exception):
    """The node is ending, or the model is no longer wanted."""


@dataclass(slots=True)
class HashingProgress:
    """One hashing: written by its thread, read by any. `stop` ends it."""

    bytes: int = 0
    bytes_done: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class FilePosition:
    """Where the bytes of a tensor or a text file begin."""

    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a directory holds, by its listing and its headers; `files`: how all of it looked."""

    texts: dict[str, int]  # name -> bytes
    tensors: dict[str, StoredTensor]
    places: dict[str, FilePosition]
    files: tuple[FileStamp, ...]
    written_at_s: int  # when the newest of the weight files was written


def stamps_of(directory: Path) -> tuple[FileStamp, ...]:
    """How all files that decide what the model is look now (*blocking*).

    Raises:
        BadRequest: its index is damaged.
        OSError: a file is gone.
    """
    index = directory / INDEX
    texts = [stamp_of(path, name) for name, path in _text_files(directory)]
    return (*texts, *([stamp_of(index)] if index.is_file() else []), *map(stamp_of, weight_files(directory)))


def model_files(directory: Path) -> ModelFiles:
    """Lists the directory and reads the headers (*blocking*, milliseconds).

    Raises:
        BadRequest: a damaged file.
        OSError: a file cannot be read.
    """
    weights = weight_files(directory)
    texts = dict(_text_files(directory))
    tensors: dict[str, StoredTensor] = {}
    places = {name: FilePosition(path, 0) for name, path in texts.items()}
    for path in weights:
        for name, tensor in read_header(path).items():
            if tensor.dtype not in DTYPE_BYTES:
                raise BadRequest(f"tensor {name[:80]} of {path.name} has dtype {tensor.dtype[:16]}, which is not read", "model")
            if not is_whole(tensor):
                raise BadRequest(f"tensor {name[:80]} of {path.name} has another size than its shape says", "model")
            tensors[name], places[name] = tensor, FilePosition(path, tensor.offset)  # of two the last counts, as for the loader
    return ModelFiles(
        {name: path.stat().st_size for name, path in texts.items()},
        tensors,
        places,
        stamps_of(directory),
        max((max(0, path.stat().st_mtime_ns // _NS_PER_S) for path in weights), default=0),
    )


def manifest_of(found: ModelFiles, progress: HashingProgress) -> Manifest:
    """Hashes everything (*blocking*: about a second a gigabyte and thread).

    Raises:
        HashingStopped: `progress.stop` was set.
        OSError: a file cannot be read.
    """
    progress.bytes = sum(found.texts.values()) + sum(tensor.size_bytes for tensor in found.tensors.values())
    progress.bytes_done = 0
    with ThreadPoolExecutor(THREADS, "hashing") as pool:

        def digests(name: str, size_bytes: int) -> bytes:
            return b"".join(_hashed(found.places[name], size_bytes, progress, pool))

        return Manifest(
            FORM,
            tuple(FileEntry(name, size_bytes, digests(name, size_bytes)) for name, size_bytes in sorted(found.texts.items())),
            tuple(
                TensorEntry(name, each.dtype, each.shape, digests(name, each.size_bytes))
                for name, each in sorted(found.tensors.items())
            ),
        )


def _hashed(place: FilePosition, size_bytes: int, progress: HashingProgress, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    with place.path.open("rb", buffering=0) as file:

        def digest_at(offset: int) -> bytes:
            return digest_of(os.pread(file.fileno(), min(PIECE_BYTES, size_bytes - offset), place.offset + offset))

        offsets = range(0, size_bytes, PIECE_BYTES)
        for first in range(0, len(offsets), PIECES_AT_ONCE):
            if progress.stop.is_set():
                raise HashingStopped
            some = offsets[first : first + PIECES_AT_ONCE]
            yield from pool.map(digest_at, some)
            progress.bytes_done += min(size_bytes, some[-1] + PIECE_BYTES) - some[0]


def _text_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """By name, in order."""
    folder = directory / TEMPLATES_FOLDER
    inner = [(f"{TEMPLATES_FOLDER}/{path.name}", path) for path in folder.iterdir()] if folder.is_dir() else []
    named = [*((path.name, path) for path in directory.iterdir()), *inner]
    return ((name, path) for name, path in sorted(named) if is_text_file(name) and path.is_file())
