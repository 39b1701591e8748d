"""Manifests: the identity of a set of weights is its manifest's hash, and files are fetched in the pieces that it lists.

A manifest names the tensors (dtype, shape) and the small text files of a model, with the hash of every piece of at most
1 MiB of each. It covers content alone. The file and offset of a tensor, and how a release of this program reads the config, are
no part of it: a model split into other files has the same identity, and a model with any other byte has another.
Nodes gossip the manifest's own hash: a node that has this hash can verify the manifest, and with it every byte of the files.
A decoded manifest is bounded: names, counts, shapes and sizes are checked.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

MANIFEST_KIND = "weights.manifest"  # the call {manifest, offset} -> {size_bytes}, a slice of the manifest
PIECE_KIND = "weights.piece"  # the call {manifest, name, number} -> the piece
NOT_HELD = "weights_not_held"  # the error code of a node that lacks the manifest or piece, perhaps only for now
FORM: Final = 2  # of a manifest. Another form or size of pieces would change the identity of every model
PIECE_BYTES = 1 << 20  # delays a token's frame on the same link by 8 ms at 1 Gbit/s
DIGEST_BYTES = 32
MAX_MANIFEST_BYTES = 64 << 20  # 2 TB of weights
MAX_FILE_BYTES = 64 << 20  # the largest vocabularies take a third of it
MAX_FILES = 64

# The files that transformers reads beside the weights: config, tokenizer, templates. None of them is executable.
TEXT_FILES = frozenset(
    {
        "added_tokens.json",
        "bpe.codes",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "dict.txt",
        "generation_config.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "sentencepiece.model",
        "special_tokens_map.json",
        "spiece.model",
        "spm.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.bpe",
        "vocab.json",
        "vocab.txt",
    }
)
TEMPLATES_FOLDER = "additional_chat_templates"
# Files for one release of transformers, and further templates, whose names are the only ones with a folder.
_TEXT_FILE = re.compile(rf"(config|tokenizer)\.\d+(\.\d+)*\.json|{TEMPLATES_FOLDER}/[A-Za-z0-9_-]+\.jinja")
# Bytes of one element, by safetensors' names.
DTYPE_BYTES = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1)
DTYPE_BYTES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
_HEADS = frozenset({"lm_head", "embed_out"})  # names of the matrix behind the last layer

Size = Annotated[int, Meta(ge=0, le=1 << 44)]
Digests = Annotated[bytes, Meta(max_length=MAX_MANIFEST_BYTES)]


class BadManifest(ValueError):
    """The bytes are not a manifest, or not the requested one; the message has the reason."""


@dataclass(frozen=True, slots=True, order=True)
class WeightPiece:
    """Bytes `[offset, offset + size_bytes)` of the tensor or file `name`."""

    name: str
    number: int
    offset: int
    size_bytes: int
    digest: bytes

    def matches(self, content: bytes) -> bool:
        """Returns whether `content` has the size and hash of this piece."""
        return len(content) == self.size_bytes and digest_of(content) == self.digest


class FileEntry(msgspec.Struct, frozen=True, array_like=True):
    """A text file. `digests`: the hashes of its pieces, concatenated."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    size_bytes: Size
    digests: Digests


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """A tensor. `digests`: the hashes of its pieces, concatenated."""

    name: Annotated[str, Meta(min_length=1, max_length=512)]
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=1 << 40)], ...], Meta(max_length=8)]
    digests: Digests

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


ManifestEntry = FileEntry | TensorEntry


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """The content of a model. Both lists are sorted by name."""

    form: Literal[2]
    files: Annotated[tuple[FileEntry, ...], Meta(max_length=MAX_FILES)]
    tensors: Annotated[tuple[TensorEntry, ...], Meta(max_length=1 << 20)]

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Manifest)


def is_text_file(name: str) -> bool:
    """Returns whether a file of this name is a text file of a model; `/` separates a folder in the name."""
    return name in TEXT_FILES or _TEXT_FILE.fullmatch(name) is not None


def encode(manifest: Manifest) -> bytes:
    """Returns the canonical bytes: equal manifests give equal bytes."""
    return _encoder.encode(manifest)


def identity(encoded: bytes) -> str:
    """Returns the hash of an encoded manifest, the identity of the weights: 64 hex digits."""
    return digest_of(encoded).hex()


def is_identity(text: object) -> bool:
    """Returns whether a value from a peer has the form of an identity: it may then be part of a file name."""
    return isinstance(text, str) and len(text) == 2 * DIGEST_BYTES and set(text) <= set("0123456789abcdef")


def decode(encoded: bytes, wanted: str) -> Manifest:
    """Decodes the manifest whose identity is `wanted`.

    Raises:
        BadManifest: the bytes have another identity, or are out of bounds.
    """
    if len(encoded) > MAX_MANIFEST_BYTES or identity(encoded) != wanted:
        raise BadManifest(f"the manifest that came is not {wanted[:16]}")
    try:
        manifest = _decoder.decode(encoded)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadManifest(f"not a manifest: {error}") from None
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    for entries in (manifest.files, manifest.tensors):
        names = [entry.name for entry in entries]
        if names != sorted(set(names)):
            raise BadManifest("names that are not in order, or come twice")
    for file in manifest.files:
        if not is_text_file(file.name) or file.size_bytes > MAX_FILE_BYTES:
            raise BadManifest(f"{file.name[:64]!r} of {file.size_bytes} bytes is no file of a model's text side")
    for tensor in manifest.tensors:
        if tensor.dtype not in DTYPE_BYTES or tensor.name == "__metadata__" or not tensor.name.isprintable():
            raise BadManifest(f"{tensor.name[:64]!r} of dtype {tensor.dtype} is no tensor of ours")
        if tensor.size_bytes > 1 << 44:
            raise BadManifest(f"{tensor.name[:64]!r} is absurdly large")
    every: list[ManifestEntry] = [*manifest.files, *manifest.tensors]
    for entry in every:
        if len(entry.digests) != DIGEST_BYTES * -(-entry.size_bytes // PIECE_BYTES):
            raise BadManifest(f"{entry.name[:64]!r} has {len(entry.digests)} bytes of hashes for {entry.size_bytes} bytes")


def pieces_of(entry: ManifestEntry) -> Iterator[WeightPiece]:
    """Yields the pieces of a file or tensor, in order."""
    for number, offset in enumerate(range(0, entry.size_bytes, PIECE_BYTES)):
        size_bytes = min(PIECE_BYTES, entry.size_bytes - offset)
        digest = entry.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        yield WeightPiece(entry.name, number, offset, size_bytes, digest)


def digest_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def layer_of(tensor: str) -> int | None:
    """Returns the decoder layer of a tensor: the first number in its dotted name; None for a tensor outside the layers."""
    return next((int(part) for part in tensor.split(".") if part.isdecimal() and len(part) < 6), None)


def tensors_of_span(
    tensors: Iterable[TensorEntry], layers: int, start: int, end: int, vocab_size: int | None, *, tied: bool
) -> list[TensorEntry]:
    """Returns the tensors that a stage of the layers `[start, end)` needs.

    Large tensors outside the layers have `vocab_size` as their first dimension: the first stage needs the embedding, the last
    stage the head, or the embedding where it is the head too (`tied`). All stages need the others, which are small (final norm,
    position tables). With `vocab_size` None all stages need all tensors outside the layers.
    """
    every = list(tensors)
    heads = {each.name for each in every if _HEADS & set(each.name.split(".")) and layer_of(each.name) is None}
    tied = tied or not heads
    wanted = []
    for tensor in every:
        layer = layer_of(tensor.name)
        if layer is not None:
            needed = start <= layer < end
        elif vocab_size is None or vocab_size not in tensor.shape[:1]:
            needed = True
        elif tensor.name in heads:
            needed = end == layers
        else:
            needed = start == 0 or (end == layers and tied)
        if needed:
            wanted.append(tensor)
    return wanted
