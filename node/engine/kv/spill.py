"""Bytes that wait for their next use outside the engine's own memory: some in host memory, the rest in files.

What came or was read last lies in memory, and what it displaces goes to a file. Both tiers are bounded in bytes; what
fits into neither is not taken. A file is private to the user (0600, in a folder that only the user may enter), its name is a
keyed hash, and behind the content stands a keyed hash of name and content: a file that was cut, changed or exchanged is
refused and counted, never read as what it is not. The key lives as long as the process. Nothing is kept beyond `close`;
what a killed process left is removed at the next start.

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


class Damaged(Exception):
    """What was asked for is not there any more, or not what was put."""


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
    """`memory_bytes`, `disk_bytes`: the most that may lie there; `folder`: for the files, its own, made when it is needed.

    Raises:
        BadRequest: the folder cannot be made.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int, folder: Path | None) -> None:
        self._memory_room, self._disk_room = memory_bytes, disk_bytes if folder is not None else 0
        self._folder = folder
        self._key = os.urandom(32)
        self._memory: OrderedDict[bytes, bytes] = OrderedDict()  # what was wanted longest ago comes first
        self._files: dict[bytes, int] = {}  # with the sizes of their contents
        self._counted = SpillStatistics()
        self._lock = threading.Lock()
        self._closed = False
        if folder is not None:
            _clear(folder)
            if self._disk_room > 0:
                _make(folder)

    def room_for(self, size_bytes: int) -> int:
        """How many contents of at most this size there is room for, were there no others."""
        return self._memory_room // size_bytes + self._disk_room // (size_bytes + TAG_BYTES)

    def statistics(self) -> SpillStatistics:
        with self._lock:
            return replace(self._counted)

    def put(self, name: bytes, content: bytes) -> bool:
        """Whether it is kept. A name is put once."""
        with self._lock:
            kept = not self._closed and self._take_up(name, content)
            self._counted.put_total += kept
            self._counted.refused_total += not kept
            return kept

    def get(self, name: bytes) -> bytes:
        """Raises Damaged, and forgets it: it is not here, or not as it was put."""
        with self._lock:
            content = self._memory.get(name)
            if content is not None:
                self._memory.move_to_end(name)
            else:
                content = self._read_file(name)
                self._counted.read_from_disk_total += 1
                if len(content) <= self._memory_room:
                    self._remove_file(name)
                    self._counted.refused_total += not self._take_up(name, content)
            self._counted.read_total += 1
            return content

    def drop(self, name: bytes) -> None:
        """Unknown names are fine."""
        with self._lock:
            content = self._memory.pop(name, None)
            if content is not None:
                self._counted.memory_bytes -= len(content)
            self._remove_file(name)

    def close(self) -> None:
        """Everything goes; what is put afterwards is not kept."""
        with self._lock:
            self._closed = True
            self._memory.clear()
            self._files.clear()
            self._counted.memory_bytes = self._counted.disk_bytes = 0
            if self._folder is not None:
                _clear(self._folder)

    def _take_up(self, name: bytes, content: bytes) -> bool:
        """Into memory, at the expense of what was wanted longest ago, which goes to disk; without memory, to disk itself."""
        if len(content) > self._memory_room:
            return self._write_file(name, content)
        while self._counted.memory_bytes + len(content) > self._memory_room:
            oldest, displaced = next(iter(self._memory.items()))
            if not self._write_file(oldest, displaced):
                return self._write_file(name, content)
            del self._memory[oldest]
            self._counted.memory_bytes -= len(displaced)
        self._memory[name] = content
        self._counted.memory_bytes += len(content)
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
        if self._counted.disk_bytes + size_bytes > self._disk_room:
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
        self._files[name] = len(content)
        self._counted.disk_bytes += size_bytes
        return True

    def _read_file(self, name: bytes) -> bytes:
        length = self._files.get(name)
        if length is None:
            raise Damaged("it is not here")
        try:
            with open(os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                fits = os.fstat(file.fileno()).st_size == length + TAG_BYTES
                content, tag = (file.read(length), file.read(TAG_BYTES)) if fits else (b"", b"")
        except OSError:
            fits, content, tag = False, b"", b""
        if not fits or tag != self._tag(name, content):
            self._counted.damaged_total += 1
            self._remove_file(name)
            raise Damaged("it is not what was put")
        return content

    def _remove_file(self, name: bytes) -> None:
        length = self._files.pop(name, None)
        if length is not None:
            self._counted.disk_bytes -= length + TAG_BYTES
            self._path(name).unlink(missing_ok=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise BadRequest(f"--spill-disk: cannot make {folder}: {error.strerror}", "spill_disk") from None


def _clear(folder: Path) -> None:
    """A link in its place is not followed: `_make` then refuses it."""
    shutil.rmtree(folder, ignore_errors=True)
