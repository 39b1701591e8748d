"""Stores bytes outside the engine's own memory: some in host memory, the rest in files.

The content put or read last is in memory; content that it displaces moves to a file. Both tiers are bounded in bytes; content
that fits into neither is refused. A file is private to the user (0600, in a folder that only the user may enter), its name is a
keyed hash, and a keyed hash of name and content follows the content: a file that was truncated, changed or exchanged is refused
and counted. The key lives as long as the process. `close` removes everything; files of a killed process are removed at the next
start.

All methods may be called from any thread.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import structlog

from mesh.errors import BadRequest

TAG_BYTES = 16

log = structlog.get_logger()


class SpilledContentLost(Exception):
    """The content is not stored any more, or the file does not hold what was put."""


@dataclass(slots=True)
class SpillStatistics:
    """`*_bytes`: in use now."""

    memory_bytes: int = 0
    disk_bytes: int = 0
    put_total: int = 0
    read_total: int = 0
    read_from_disk_total: int = 0
    refused_total: int = 0  # found no room, or could not be written
    damaged_total: int = 0  # could not be read back as they were put


class Spill:
    """`memory_bytes`, `disk_bytes`: the limits of the two tiers; `folder`: for the files and nothing else, created when needed.

    Raises:
        BadRequest: the folder cannot be made.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int, folder: Path | None) -> None:
        self._max_memory_bytes, self._max_disk_bytes = memory_bytes, disk_bytes if folder is not None else 0
        self._folder = folder
        self._key = os.urandom(32)
        self._memory: OrderedDict[bytes, bytes] = OrderedDict()  # the least recently used first
        self._file_bytes: dict[bytes, int] = {}  # name -> size of the content
        self._counted = SpillStatistics()
        self._lock = threading.Lock()
        self._closed = False
        if folder is not None:
            _remove_folder(folder)
            if self._max_disk_bytes > 0:
                _make_folder(folder)

    def capacity(self, size_bytes: int) -> int:
        """Returns how many contents of at most `size_bytes` fit into an empty store."""
        return self._max_memory_bytes // size_bytes + self._max_disk_bytes // (size_bytes + TAG_BYTES)

    def statistics(self) -> SpillStatistics:
        with self._lock:
            return replace(self._counted)

    def put(self, name: bytes, content: bytes) -> bool:
        """Stores the content; False: there was no room. A name may be put once only."""
        with self._lock:
            stored = not self._closed and self._insert(name, content)
            self._counted.put_total += stored
            self._counted.refused_total += not stored
            return stored

    def get(self, name: bytes) -> bytes:
        """Returns the content. Raises SpilledContentLost, and forgets the name: not stored, or not as it was put."""
        with self._lock:
            content = self._memory.get(name)
            if content is not None:
                self._memory.move_to_end(name)
            else:
                content = self._read_file(name)
                self._counted.read_from_disk_total += 1
                if len(content) <= self._max_memory_bytes:
                    # The file goes first, so that its bytes are free for the content which this one displaces from memory.
                    self._remove_file(name)
                    self._counted.refused_total += not self._insert(name, content)
            self._counted.read_total += 1
            return content

    def drop(self, name: bytes) -> None:
        """Removes the content; no effect for an unknown name."""
        with self._lock:
            content = self._memory.pop(name, None)
            if content is not None:
                self._counted.memory_bytes -= len(content)
            self._remove_file(name)

    def close(self) -> None:
        """Removes everything; content that is put afterwards is refused."""
        with self._lock:
            self._closed = True
            self._memory.clear()
            self._file_bytes.clear()
            self._counted.memory_bytes = self._counted.disk_bytes = 0
            if self._folder is not None:
                _remove_folder(self._folder)

    def _insert(self, name: bytes, content: bytes) -> bool:
        """Stores in memory and moves the least recently used contents to disk; content larger than memory goes to disk."""
        assert name not in self._memory and name not in self._file_bytes
        if len(content) > self._max_memory_bytes:
            return self._write_file(name, content)
        while self._counted.memory_bytes + len(content) > self._max_memory_bytes:
            oldest, displaced = next(iter(self._memory.items()))
            if not self._write_file(oldest, displaced):
                return self._write_file(name, content)  # the new content may be smaller than the displaced one
            del self._memory[oldest]
            self._counted.memory_bytes -= len(displaced)
        self._memory[name] = content
        self._counted.memory_bytes += len(content)
        assert self._counted.memory_bytes <= self._max_memory_bytes
        return True

    # ---- files

    def _path(self, name: bytes) -> Path:
        assert self._folder is not None
        return self._folder / blake2b(name, key=self._key, digest_size=16).hexdigest()

    def _tag(self, name: bytes, content: bytes) -> bytes:
        digest = blake2b(len(name).to_bytes(4, "little") + name, key=self._key, digest_size=TAG_BYTES, person=b"mesh-spill")
        digest.update(content)
        return digest.digest()

    def _write_file(self, name: bytes, content: bytes) -> bool:
        size_bytes = len(content) + TAG_BYTES
        if self._counted.disk_bytes + size_bytes > self._max_disk_bytes:
            return False
        path = self._path(name)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(content)
                file.write(self._tag(name, content))
        except OSError as error:
            log.warning("spill.not_written", reason=error.strerror)
            path.unlink(missing_ok=True)
            return False
        self._file_bytes[name] = len(content)
        self._counted.disk_bytes += size_bytes
        return True

    def _read_file(self, name: bytes) -> bytes:
        length = self._file_bytes.get(name)
        if length is None:
            raise SpilledContentLost("it is not here")
        try:
            with open(os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                # The size is checked before anything is read: a replaced file may be of any size.
                fits = os.fstat(file.fileno()).st_size == length + TAG_BYTES
                content, tag = (file.read(length), file.read(TAG_BYTES)) if fits else (b"", b"")
        except OSError:
            fits, content, tag = False, b"", b""
        if not fits or tag != self._tag(name, content):
            self._counted.damaged_total += 1
            self._remove_file(name)
            raise SpilledContentLost("it is not what was put")
        return content

    def _remove_file(self, name: bytes) -> None:
        length = self._file_bytes.pop(name, None)
        if length is not None:
            self._counted.disk_bytes -= length + TAG_BYTES
            self._path(name).unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise BadRequest(f"--spill-disk: cannot make {folder}: {error.strerror}", "spill_disk") from None


def _remove_folder(folder: Path) -> None:
    """Removes the folder with its files; a symbolic link in its place is not followed, and `_make_folder` refuses it."""
    shutil.rmtree(folder, ignore_errors=True)
