"""What is kept of a model's files so that they are hashed once: the manifest, and what the files looked like when it was made.

The record lies beside the files, so that all nodes of a machine share it. Where the directory cannot be written, and
for files that are part of this package, it lies in the node's data directory. A record counts only while name, size, change
time and inode of every file are as they were: a copy of the directory, or a file that was written again, is hashed
again. What these figures cannot show, such as a damaged disk, the verification of the bytes finds (`verifying`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from mesh.files import replace_file
from mesh.manifest import MAX_MANIFEST_BYTES

RECORD = ".mesh-manifest"  # the file's name beside the model's files
_PACKAGE = Path(__file__).resolve().parents[1]  # what pip installed is not ours to write to
_READABLE_BY_ALL = 0o644  # it holds less than the files themselves


class FileStamp(NamedTuple):
    """How a file looked."""

    name: str
    size_bytes: int
    mtime_ns: int
    inode: int


class FileChange(NamedTuple):
    """`in_place`: the file itself was written, and what is mapped of it into memory changed with it. Else another file, or
    none, has its name now, and what was loaded from it is as it was.
    """

    file: str
    in_place: bool


class ManifestRecord(msgspec.Struct, frozen=True, array_like=True):
    """`manifest`: encoded."""

    form: Literal[1]
    files: tuple[FileStamp, ...]
    manifest: bytes


def stamp_of(path: Path, name: str = "") -> FileStamp:
    """How the file looks now, through symbolic links. Raises OSError."""
    status = path.stat()
    return FileStamp(name or path.name, status.st_size, status.st_mtime_ns, status.st_ino)


def changed_file(directory: Path, before: Iterable[FileStamp]) -> FileChange | None:
    """A file that looks otherwise now, or is gone (*blocking*); one that was written in place before all others."""
    changes = []
    for stamp in before:
        try:
            now = stamp_of(directory / stamp.name, stamp.name)
        except OSError:
            changes.append(FileChange(stamp.name, in_place=False))
            continue
        if now != stamp:
            changes.append(FileChange(stamp.name, in_place=now.inode == stamp.inode))
    return min(changes, key=lambda change: (not change.in_place, change.file), default=None)


def read_record(directory: Path, folder: Path | None, files: tuple[FileStamp, ...]) -> bytes | None:
    """The encoded manifest that was kept of exactly these files (*blocking*); None: there is none.

    `folder`: in the node's data directory; None: it has none.
    """
    for path in (directory / RECORD, *_elsewhere(directory, folder)):
        record = _read(path)
        if record is not None and record.files == files:
            return record.manifest
    return None


def write_record(directory: Path, folder: Path | None, files: tuple[FileStamp, ...], manifest: bytes) -> Path | None:
    """Keeps the manifest (*blocking*); where, or None: no disk takes it, which costs the hashing at the next start."""
    content = msgspec.msgpack.encode(ManifestRecord(1, files, manifest))
    beside = [] if directory.resolve().is_relative_to(_PACKAGE) else [directory / RECORD]
    for path in (*beside, *_elsewhere(directory, folder)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content, mode=_READABLE_BY_ALL)
        except OSError:
            continue
        return path
    return None


def _elsewhere(directory: Path, folder: Path | None) -> list[Path]:
    """Where the record lies that is not beside the files."""
    name = hashlib.blake2b(os.fsencode(directory.resolve()), digest_size=12).hexdigest()
    return [] if folder is None else [folder / name]


def _read(path: Path) -> ManifestRecord | None:
    """What is no record is as good as none: the files are hashed again."""
    try:
        if path.stat().st_size > 2 * MAX_MANIFEST_BYTES:
            return None
        return msgspec.msgpack.decode(path.read_bytes(), type=ManifestRecord)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None
