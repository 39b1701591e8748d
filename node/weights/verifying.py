"""Reads the files of a served model once more, slowly, and looks from time to time whether they are still the same files.

A record shows that files look as they did when they were hashed. It cannot show that their bytes are the same: a disk may
have damaged one, a program may have written one and set its time back. So at each start that trusts a record, and once a
day, all bytes are read and compared with the manifest, at a pace that leaves disk and processor to the requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from mesh.manifest import WeightPiece
from node.weights.catalogue import Catalogue
from node.weights.pace import RateLimit
from node.weights.record import FileChange

SERVING_BYTES_S = 16 << 20  # while sequences run here
IDLE_BYTES_S = 128 << 20  # an eighth of a core
READ_EVERY_S = 24 * 3600.0  # a span may be loaded long after the start, from what the disk holds then
LOOK_EVERY_S = 15.0  # at size, time and inode of every file
LOOK_EVERY_BYTES = 64 << 20  # and as often while bytes are read


@dataclass(slots=True)
class VerifyingStatistics:
    """Since the start."""

    bytes_verified_total: int = 0
    wrong_pieces_total: int = 0
    changed_files_total: int = 0


@dataclass(frozen=True, slots=True)
class FilesChanged:
    """The files are not those that were hashed. `file`: one that differs; `in_place`: what was loaded may differ, too."""

    file: str
    why: str
    in_place: bool


Differs = Callable[[], FileChange | None]
"""A file that does not look as it did; None: there is none (*blocking*)."""


class FileVerifier:
    """`serving`: whether sequences run on this node."""

    def __init__(self, serving: Callable[[], bool]) -> None:
        self._serving = serving
        self._reading = trio.CapacityLimiter(1)
        self._pace = RateLimit()
        self._counters = VerifyingStatistics()

    def statistics(self) -> VerifyingStatistics:
        return replace(self._counters)

    async def changed(self, catalogue: Catalogue, differs: Differs, *, verified: bool) -> FilesChanged:
        """Waits until the files differ from the catalogue. `verified`: every byte has just been hashed."""
        read_at, change = trio.current_time() if verified else float("-inf"), None
        while change is None:
            if trio.current_time() - read_at >= READ_EVERY_S:
                change = await self._read_all(catalogue, differs)
                read_at = trio.current_time()
            else:
                await trio.sleep(LOOK_EVERY_S)
                change = await self.look(differs)
        return change

    async def look(self, differs: Differs) -> FilesChanged | None:
        """Compares size, change time and inode of every file."""
        change = await trio.to_thread.run_sync(differs, limiter=self._reading)
        if change is None:
            return None
        self._counters.changed_files_total += 1
        what = "was written since it was hashed" if change.in_place else "was replaced or removed since it was hashed"
        return FilesChanged(change.file, f"{change.file} {what}", change.in_place)

    async def _read_all(self, catalogue: Catalogue, differs: Differs) -> FilesChanged | None:
        until_look_bytes = 0
        for path, piece in catalogue.pieces():
            if until_look_bytes <= 0:
                if change := await self.look(differs):
                    return change
                until_look_bytes = LOOK_EVERY_BYTES
            until_look_bytes -= piece.size_bytes
            rate = SERVING_BYTES_S if self._serving() else IDLE_BYTES_S
            await trio.sleep(self._pace.wait_s(piece.size_bytes, rate, trio.current_time()))
            wrong = await trio.to_thread.run_sync(_wrong, catalogue, piece, path, limiter=self._reading)
            if wrong is not None:
                if change := await self.look(differs):
                    return change  # it was written or replaced since the last look
                self._counters.wrong_pieces_total += 1
                return wrong
            self._counters.bytes_verified_total += piece.size_bytes
        return None


def _wrong(catalogue: Catalogue, piece: WeightPiece, path: Path) -> FilesChanged | None:
    """What is wrong with a piece as it lies on the disk now (*blocking*); None: nothing."""
    where = f"{piece.name[:80]}, bytes {piece.offset} to {piece.offset + piece.size_bytes}"
    try:
        content = catalogue.read(piece.name, piece.number, once=True)
    except OSError as error:
        return FilesChanged(path.name, f"{path.name} cannot be read at {where}: {error.strerror or error}", in_place=False)
    if content is None or piece.matches(content):
        return None
    why = f"{path.name} holds other bytes than were hashed, though it looks the same: {where}"
    return FilesChanged(path.name, why, in_place=True)
