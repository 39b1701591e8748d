"""What of a model lies where on this node's disk: its manifest, and the place of every tensor and text file.

To make a manifest every byte is hashed, once: about a second a gigabyte. It is kept, with size and change time of the
files it was made from, and made again only when one of those differs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mesh.errors import BadRequest
from mesh.view import ModelCard
from mesh.weights import (
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    PIECE_BYTES,
    TEXT_FILES,
    BadManifest,
    Entry,
    FileEntry,
    Manifest,
    TensorEntry,
    decode,
    digest_of,
    encode,
    identity,
)
from node.safetensors_header import is_whole, read_header, weight_files

Stamp = list[tuple[str, int, int]]  # of each file: name, bytes, change time in ns
Cancelled = Callable[[], bool]


class HashingStopped(Exception):
    """Somebody wanted the hashing to end."""


@dataclass(frozen=True, slots=True)
class Place:
    path: Path
    offset: int


class Catalogue:
    """`places`: of what is here; a node that holds a part of a model adds to it as more comes."""

    def __init__(self, encoded: bytes, manifest: Manifest, places: dict[str, Place]) -> None:
        self.id = identity(encoded)
        self.encoded = encoded
        self.manifest = manifest
        self.places = places
        every: list[Entry] = [*manifest.files, *manifest.tensors]
        self._entries = {entry.name: entry for entry in every}

    def size_bytes(self, name: str, number: int) -> int:
        """Of piece `number` of `name`; 0: there is no such piece."""
        entry = self._entries.get(name)
        left = 0 if entry is None or number < 0 else entry.size_bytes - number * PIECE_BYTES
        return max(0, min(PIECE_BYTES, left))

    def read(self, name: str, number: int) -> bytes | None:
        """Piece `number` of `name` (*blocking*, milliseconds); None: not here.

        Raises:
            OSError: it cannot be read, or is shorter than it was.
        """
        place, size_bytes = self.places.get(name), self.size_bytes(name, number)
        if place is None or size_bytes == 0:
            return None
        with place.path.open("rb", buffering=0) as file:
            content = os.pread(file.fileno(), size_bytes, place.offset + number * PIECE_BYTES)
        if len(content) != size_bytes:
            raise OSError(f"{place.path.name} is shorter than it was")
        return content


def catalogue_of(directory: Path, card: ModelCard, kept_in: Path, cancelled: Cancelled = lambda: False) -> Catalogue:
    """The catalogue of a whole model directory (*blocking*: about a second a gigabyte the first time).

    Raises:
        BadRequest: no model that could be told of, e.g. a damaged file.
        HashingStopped: `cancelled` said so.
        OSError: a file cannot be read.
    """
    texts = {name: directory / name for name in sorted(TEXT_FILES) if _is_small_file(directory / name)}
    stored = {path: read_header(path) for path in weight_files(directory)}
    stamp = _stamp([*texts.values(), *stored])
    places = {name: Place(path, 0) for name, path in texts.items()}
    for path, tensors in stored.items():
        for name, tensor in tensors.items():
            if not is_whole(tensor):
                raise BadRequest(f"tensor {name[:80]} of {path.name} has another size than its shape says", "model")
            places.setdefault(name, Place(path, tensor.offset))
    cache = kept_in / hashlib.blake2b(os.fsencode(directory.resolve()), digest_size=12).hexdigest()
    encoded = _kept(cache, stamp, card)
    if encoded is None:
        tensors = {name: tensor for each in stored.values() for name, tensor in each.items()}
        manifest = Manifest(
            card.weights,
            card.layers,
            card.max_model_len,
            tuple(
                FileEntry(name, path.stat().st_size, _digests(places[name], path.stat().st_size, cancelled))
                for name, path in texts.items()
            ),
            tuple(
                TensorEntry(name, each.dtype, each.shape, _digests(places[name], each.size_bytes, cancelled))
                for name, each in sorted(tensors.items())
            ),
        )
        encoded = encode(manifest)
        _keep(cache, stamp, encoded)
    try:
        return Catalogue(encoded, decode(encoded, identity(encoded)), places)
    except BadManifest as error:
        raise BadRequest(f"{directory.name} cannot be handed to peers: {error}", "model") from None


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= MAX_FILE_BYTES


def _stamp(paths: list[Path]) -> Stamp:
    return [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]


def _digests(place: Place, size_bytes: int, cancelled: Cancelled) -> bytes:
    return b"".join(_hashed(place, size_bytes, cancelled))


def _hashed(place: Place, size_bytes: int, cancelled: Cancelled) -> Iterator[bytes]:
    with place.path.open("rb", buffering=0) as file:
        for offset in range(0, size_bytes, PIECE_BYTES):
            if cancelled():
                raise HashingStopped
            yield digest_of(os.pread(file.fileno(), min(PIECE_BYTES, size_bytes - offset), place.offset + offset))


def _kept(cache: Path, stamp: Stamp, card: ModelCard) -> bytes | None:
    """What was kept for exactly these files and this card, if it is as it was written."""
    try:
        if cache.stat().st_size > 2 * MAX_MANIFEST_BYTES:
            return None
        kept_stamp, encoded = msgspec.msgpack.decode(cache.read_bytes(), type=tuple[Stamp, bytes])
        manifest = decode(encoded, identity(encoded))
    except (OSError, msgspec.MsgspecError, BadManifest):
        return None
    return encoded if kept_stamp == stamp and manifest.agrees_with(card) else None


def _keep(cache: Path, stamp: Stamp, encoded: bytes) -> None:
    """Written aside and renamed: what is there is whole. A disk that keeps nothing costs the hashing at the next start."""
    aside = cache.with_suffix(".new")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(msgspec.msgpack.encode((stamp, encoded)))
        aside.replace(cache)
    except OSError:
        pass
