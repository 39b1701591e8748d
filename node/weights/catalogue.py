"""A model's files on this node's disk: which weights they are, and where every piece of them lies.

To know the weights of a directory every byte is hashed, once; the manifest is kept with what the files looked like
(`record`), and made again only when one of them looks otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mesh.errors import BadRequest
from mesh.manifest import (
    PIECE_BYTES,
    BadManifest,
    Manifest,
    ManifestEntry,
    WeightPiece,
    decode,
    encode,
    identity,
    pieces_of,
)
from node.weights.hashing import FilePosition, HashingProgress, manifest_of, model_files, stamps_of
from node.weights.record import FileStamp, read_record, write_record

TRIES = 3  # to hash files that change meanwhile


class Catalogue:
    """`places`: of what is here; a node that holds a part of a model adds to it as more comes."""

    def __init__(self, encoded: bytes, manifest: Manifest, places: dict[str, FilePosition]) -> None:
        self.id = identity(encoded)
        self.encoded = encoded
        self.manifest = manifest
        self.places = places
        every: list[ManifestEntry] = [*manifest.files, *manifest.tensors]
        self._entries = {entry.name: entry for entry in every}

    def size_bytes(self, name: str, number: int) -> int:
        """Of piece `number` of `name`; 0: there is no such piece."""
        entry = self._entries.get(name)
        left = 0 if entry is None or number < 0 else entry.size_bytes - number * PIECE_BYTES
        return max(0, min(PIECE_BYTES, left))

    def read(self, name: str, number: int, *, once: bool = False) -> bytes | None:
        """Piece `number` of `name` (*blocking*, milliseconds); None: not here.

        `once`: the system need not keep it in memory for another reader.

        Raises:
            OSError: it cannot be read, or is shorter than it was.
        """
        place, size_bytes = self.places.get(name), self.size_bytes(name, number)
        if place is None or size_bytes == 0:
            return None
        with place.path.open("rb", buffering=0) as file:
            offset = place.offset + number * PIECE_BYTES
            content = os.pread(file.fileno(), size_bytes, offset)
            if once and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), offset, size_bytes, os.POSIX_FADV_DONTNEED)
        if len(content) != size_bytes:
            raise OSError(f"{place.path.name} is shorter than it was")
        return content

    def pieces(self) -> Iterator[tuple[Path, WeightPiece]]:
        """All that is here now, with its file, in the order in which a disk reads it best."""
        for name, place in sorted(self.places.items(), key=lambda item: (item[1].path, item[1].offset)):
            for piece in pieces_of(self._entries[name]):
                yield place.path, piece

    def is_fit_for_peers(self) -> bool:
        """Whether a peer would accept the manifest: it may be out of the bounds that a peer's word is held to."""
        try:
            decode(self.encoded, self.id)
        except BadManifest:
            return False
        return True


@dataclass(frozen=True, slots=True)
class IdentifiedWeights:
    """The weights of a directory. `kept`: they are known by a record, and no byte was read this time."""

    catalogue: Catalogue
    files: tuple[FileStamp, ...]
    written_at_s: int
    kept: bool


def identify(directory: Path, folder: Path | None, progress: HashingProgress, *, afresh: bool = False) -> IdentifiedWeights:
    """Finds out which weights a whole model directory holds (*blocking*: a second a gigabyte and thread the first time).

    `folder`: where a record is kept that cannot lie beside the files; None: nowhere. `afresh`: no record is believed.

    Raises:
        BadRequest: a damaged file, or files that change all the time.
        HashingStopped: `progress.stop` was set.
        OSError: a file cannot be read.
    """
    for _ in range(TRIES):
        found = model_files(directory)
        kept = None if afresh else read_record(directory, folder, found.files)
        manifest = None if kept is None else _manifest_in(kept, found.places)
        if kept is not None and manifest is not None:
            return IdentifiedWeights(Catalogue(kept, manifest, found.places), found.files, found.written_at_s, kept=True)
        manifest = manifest_of(found, progress)
        encoded = encode(manifest)
        if stamps_of(directory) == found.files:
            write_record(directory, folder, found.files, encoded)
            return IdentifiedWeights(Catalogue(encoded, manifest, found.places), found.files, found.written_at_s, kept=False)
    raise BadRequest(
        f"the files of {directory.name} changed each of the {TRIES} times that they were hashed; wait until they are complete",
        "model",
        "model_not_servable",
    )


def _manifest_in(record: bytes, places: dict[str, FilePosition]) -> Manifest | None:
    """The manifest of a record, if it is one and names what is in the directory."""
    try:
        manifest = decode(record, identity(record))
    except BadManifest:
        return None
    every: list[ManifestEntry] = [*manifest.files, *manifest.tensors]
    return manifest if {entry.name for entry in every} == places.keys() else None
