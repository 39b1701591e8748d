"""The directory of a model whose files come from peers: whole files that a loader may read, and parts that grow.

One safetensors file a layer, and one a tensor outside the layers, so that a span is a set of whole files and a loader can
never take for weights what has not come: what is not here is in no file and in no index. A part lies beside the files under
another ending, at its full size from the start, so a full disk is reported before anything is fetched. After a restart
the pieces of a part are hashed again: what matches is kept, whatever else is in it is fetched anew. So is a file that
does not look as it did when it was completed: it becomes a part.

The manifest beside the files identifies the whole model: a part of a model has the identity of the whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mesh.errors import BadRequest
from mesh.files import replace_file
from mesh.manifest import (
    DTYPE_BYTES,
    BadManifest,
    Manifest,
    ManifestEntry,
    TensorEntry,
    WeightPiece,
    decode,
    encode,
    layer_of,
    pieces_of,
)
from node.checkpoints.safetensors_header import INDEX, make_header
from node.weights.catalogue import Catalogue
from node.weights.hashing import FilePosition
from node.weights.record import FileChange, FileStamp, changed_file, stamp_of

MARK = "pulled.json"  # beside the files: which model they are of, and how each looked when it was complete
MANIFEST = "pulled.manifest"  # beside them: the model's manifest
PART = ".part"
SPARE_BYTES = 256 << 20  # of the disk, left to the documents and to other programs


class WrongPiece(Exception):
    """The bytes are not those of the manifest."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it will be: `head`, then the entries at their offsets."""

    path: Path
    head: bytes
    entries: tuple[ManifestEntry, ...]
    offsets: dict[str, int]

    @property
    def size_bytes(self) -> int:
        return len(self.head) + sum(entry.size_bytes for entry in self.entries)

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + PART)

    @property
    def name(self) -> str:
        """Within the model's directory."""
        return self.path.name if self.head else self.entries[0].name

    def is_here(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size_bytes


class _Mark(msgspec.Struct, frozen=True):
    manifest: str  # its identity
    files: dict[str, FileStamp] = {}


class PulledModel:
    """Every method is *blocking*; one thread at a time."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Makes the directory, or takes up what is there of it. Raises OSError."""
        self.directory = directory
        self.manifest = manifest
        self.catalogue = Catalogue(encode(manifest), manifest, {})
        self._files = {file.name: file for file in _layout(directory, manifest)}
        self._file_of = {entry.name: file for file in self._files.values() for entry in file.entries}
        self._lacks: dict[str, set[WeightPiece]] = {}  # of the files that are being fetched, by name
        directory.mkdir(parents=True, exist_ok=True)
        mark = _mark_in(directory)
        known = mark.files if mark is not None and mark.manifest == self.catalogue.id else {}
        self._stamps: dict[str, FileStamp] = {}
        _write(directory / MANIFEST, self.catalogue.encoded)
        for name, file in self._files.items():
            if file.is_here() and known.get(name) == stamp_of(file.path, name):
                self._stamps[name] = known[name]
                self._can_be_read(file)
            elif file.path.is_file():
                file.path.replace(file.part)
        self._write_mark()
        self._write_index()

    @classmethod
    def at(cls, directory: Path) -> PulledModel:
        """What an earlier start fetched.

        Raises:
            BadRequest: its model cannot be identified any more.
            OSError: it cannot be read.
        """
        mark = _mark_in(directory)
        try:
            manifest = None if mark is None else decode((directory / MANIFEST).read_bytes(), mark.manifest)
        except (FileNotFoundError, BadManifest):
            manifest = None
        if manifest is None:
            raise BadRequest(
                f"the files in {directory.name} came from peers, and what of which model they are cannot be told any more; "
                "have them fetched again: mesh up --join HOST:PORT --model ID",
                "model",
                "model_not_servable",
            )
        return cls(directory, manifest)

    def differs(self) -> FileChange | None:
        """A file that does not look as it did when it was complete; None: there is none."""
        return changed_file(self.directory, self._stamps.values())

    def set_aside(self, name: str) -> None:
        """Takes a complete file for a part again: its pieces are hashed and the wrong ones fetched when it is next asked for."""
        file = self._files[name]
        for entry in file.entries:
            self.catalogue.places.pop(entry.name, None)
        self._stamps.pop(name, None)
        self._write_mark()
        self._write_index()
        if file.path.is_file():
            file.path.replace(file.part)

    def missing(self, names: Iterable[str]) -> list[WeightPiece]:
        """The pieces to fetch until all of `names` are here; what a part holds already is hashed (a second a gigabyte).

        Raises:
            BadRequest: the disk has no room for them.
            OSError: the disk cannot be written.
        """
        wanted = {self._file_of[name].name: self._file_of[name] for name in names}
        files = [file for _, file in sorted(wanted.items()) if not file.is_here()]
        self._make_room(files)
        pieces: list[WeightPiece] = []
        for file in files:
            lacking = self._lacking(file)
            pieces += lacking
            self._lacks[file.name] = set(lacking)
            if not lacking:
                self._finish(file)
        return pieces

    def keep(self, piece: WeightPiece, content: bytes) -> None:
        """Checks a piece and writes it; with the last one of a file, the file is there to be read.

        Raises:
            WrongPiece: not the bytes that were wanted; nothing was written.
            OSError: the disk cannot be written.
        """
        if not piece.matches(content):
            raise WrongPiece(piece.name)
        file = self._file_of[piece.name]
        lacks = self._lacks.get(file.name, set())
        if piece not in lacks:
            return  # it came twice
        with file.part.open("r+b", buffering=0) as part:
            os.pwrite(part.fileno(), content, file.offsets[piece.name] + piece.offset)
        lacks.discard(piece)
        if not lacks:
            self._finish(file)

    def _lacking(self, file: _File) -> list[WeightPiece]:
        """Of the file's part, which is made if there is none, the pieces that do not match."""
        every = [piece for entry in file.entries for piece in pieces_of(entry)]
        if not file.part.is_file() or file.part.stat().st_size != file.size_bytes:
            file.part.parent.mkdir(exist_ok=True)
            with file.part.open("wb") as part:
                part.write(file.head)
                _reserve(part.fileno(), file.size_bytes)
            return every
        with file.part.open("rb", buffering=0) as part:
            return [
                piece
                for piece in every
                if not piece.matches(os.pread(part.fileno(), piece.size_bytes, file.offsets[piece.name] + piece.offset))
            ]

    def _finish(self, file: _File) -> None:
        with file.part.open("r+b", buffering=0) as part:
            os.pwrite(part.fileno(), file.head, 0)
            os.fsync(part.fileno())
        file.part.replace(file.path)
        self._stamps[file.name] = stamp_of(file.path, file.name)
        self._write_mark()
        self._can_be_read(file)
        if file.head:
            self._write_index()

    def _can_be_read(self, file: _File) -> None:
        self.catalogue.places.update({name: FilePosition(file.path, offset) for name, offset in file.offsets.items()})

    def _write_mark(self) -> None:
        _write(self.directory / MARK, msgspec.json.encode(_Mark(self.catalogue.id, self._stamps)))

    def _write_index(self) -> None:
        here = self.catalogue.places
        tensors = [tensor for tensor in self.manifest.tensors if tensor.name in here]
        index = {
            "metadata": {"total_size": sum(tensor.size_bytes for tensor in tensors)},
            "weight_map": {tensor.name: here[tensor.name].path.name for tensor in tensors},
        }
        _write(self.directory / INDEX, json.dumps(index).encode())

    def _make_room(self, files: list[_File]) -> None:
        needed_bytes = sum(file.size_bytes for file in files if not file.part.is_file())
        free_bytes = shutil.disk_usage(self.directory).free
        if needed_bytes and needed_bytes + SPARE_BYTES > free_bytes:
            raise BadRequest(
                f"the weights to fetch take {needed_bytes >> 20} MiB on disk, and of its {free_bytes >> 20} MiB free "
                f"{SPARE_BYTES >> 20} MiB stay free; make room, or give a --data-dir on another disk",
                "data_dir",
            )


def _layout(directory: Path, manifest: Manifest) -> list[_File]:
    files = [_File(directory / entry.name, b"", (entry,), {entry.name: 0}) for entry in manifest.files]
    groups: dict[str, list[TensorEntry]] = {}
    outside = 0
    for tensor in manifest.tensors:
        layer = layer_of(tensor.name)
        outside += layer is None
        groups.setdefault(f"outside-{outside:05d}" if layer is None else f"layer-{layer:05d}", []).append(tensor)
    for name, tensors in groups.items():
        # The widest elements first, so that each tensor begins at a multiple of its elements' size.
        ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
        head, offsets = make_header(ordered)
        files.append(_File(directory / f"{name}.safetensors", head, tuple(ordered), offsets))
    return files


def _mark_in(directory: Path) -> _Mark | None:
    """Returns the mark's content; None: there is none that can be read."""
    try:
        return msgspec.json.decode((directory / MARK).read_bytes(), type=_Mark)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Takes the room now where the file system can: a disk that fills up meanwhile then does no harm here."""
    os.ftruncate(descriptor, size_bytes)
    if hasattr(os, "posix_fallocate") and size_bytes:
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _write(path: Path, content: bytes) -> None:
    """Replaces the file atomically, unless it holds `content` already."""
    if not (path.is_file() and path.read_bytes() == content):
        replace_file(path, content, mode=0o644)
