"""What document services say to each other: typed headers and tails, decoded strictly.

Text, vectors and files travel in the raw tail, so headers stay small. A vector is f16, little-endian; it is made
once, by the node that took the document, and never again: replicas cannot drift apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from mesh.errors import BadRequest
from rag.clock import is_too_far_ahead
from rag.registry import FILES_ID, StoreEntry
from rag.replica import SHARDS, DocumentHead, ListingEntry, ShardDigest
from rag.search import ShardResult, from_wire

BATCH_BYTES = 4 << 20  # of operations in one answer; a single larger one travels alone
MAX_FETCHED = 500  # documents named in one call
MAX_ID_CHARS = 128


class Operation(msgspec.Struct, frozen=True, array_like=True):
    """One write, whole: what an owner stores and what repair sends."""

    head: DocumentHead
    content: bytes = b""  # of an uploaded file
    spans: tuple[tuple[int, int, str], ...] = ()  # (start, end, text) of each chunk
    vectors: bytes = b""  # f16 [chunks, dim]

    @property
    def weight_bytes(self) -> int:
        return len(self.content) + len(self.vectors) + sum(len(text) for _, _, text in self.spans) + 200


class ApplyCall(msgspec.Struct, frozen=True):
    entry: StoreEntry


class ListingCall(msgspec.Struct, frozen=True):
    entry: StoreEntry
    shard: int


class FetchCall(msgspec.Struct, frozen=True):
    entry: StoreEntry
    docs: list[str]


class SummaryCall(msgspec.Struct, frozen=True):
    pass


class HeadsCall(msgspec.Struct, frozen=True):
    items: list[tuple[str, str]]  # (store id, document id)


class FilesCall(msgspec.Struct, frozen=True):
    """`stale_too`: answer also for shards that a peer is known to hold newer entries of."""

    entry: StoreEntry
    shards: list[int]
    stale_too: bool


class SearchCall(msgspec.Struct, frozen=True):
    """The tail is the query's vector, f16 [dim]; empty leaves the dense half out."""

    entry: StoreEntry
    shards: list[int]
    stale_too: bool
    depth: int
    terms_of: str  # the query's text; empty leaves the lexical half out


class RegisterCall(msgspec.Struct, frozen=True):
    entries: list[StoreEntry]


class Summary(msgspec.Struct, frozen=True):
    """What a node publishes of its stores: in gossip, and in full on request. `brief` set: too large, ask for it."""

    stores: list[StoreEntry] = []
    digests: dict[str, dict[str, ShardDigest]] = {}  # by store id and shard number
    brief: str = ""

    def digest(self, store: str, shard: int) -> ShardDigest:
        return self.digests.get(store, {}).get(str(shard), ShardDigest())


class ShardsReply(msgspec.Struct, frozen=True):
    """The shards that the tail answers for."""

    shards: list[int]


ENCODER = msgspec.msgpack.Encoder()
OPERATIONS = msgspec.msgpack.Decoder(list[Operation])
LISTING = msgspec.msgpack.Decoder(list[ListingEntry])
HEADS = msgspec.msgpack.Decoder(list[DocumentHead | None])
SUMMARY = msgspec.msgpack.Decoder(Summary)
ANSWER = msgspec.msgpack.Decoder(ShardResult)

T = TypeVar("T")


def header_of(call: msgspec.Struct) -> dict[str, object]:
    """The struct as plain MessagePack values."""
    built: dict[str, object] = msgspec.to_builtins(call)
    return built


def call_of(kind: type[T], header: Mapping[str, object]) -> T:
    """The typed call that a peer's header claims to be.

    Raises:
        BadRequest: it is not one.
    """
    try:
        return msgspec.convert(header, kind)
    except msgspec.ValidationError as error:
        raise BadRequest(f"expected a {kind.__name__} header: {error}") from None


def count_in(reply: Mapping[str, object], name: str) -> int:
    """Returns the count `name` of a peer's reply; 0 where the reply has none.

    Raises:
        BadRequest: it is not an integer.
    """
    count = reply.get(name, 0)
    if not isinstance(count, int):
        raise BadRequest(f"expected {name} to be an integer in the reply, got {type(count).__name__}")
    return count


def decoded(decoder: msgspec.msgpack.Decoder[T], tail: bytes) -> T:
    """The typed tail.

    Raises:
        BadRequest: it is not what it should be.
    """
    try:
        return decoder.decode(tail)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"expected a well-formed tail: {error}") from None


def file_id(name: str, content: bytes) -> str:
    """One file, one id, on every node."""
    digest = hashlib.blake2b(len(name.encode()).to_bytes(4, "big") + name.encode() + content, digest_size=12)
    return "file-" + digest.hexdigest()


def flaw_of(operation: Operation, entry: StoreEntry, dim: int, now_s: float) -> str | None:
    """Why an operation must not be stored; None if nothing is wrong with it."""
    head = operation.head
    if not 0 < len(head.doc_id) <= MAX_ID_CHARS or head.hlc <= 0 or head.hlc >= 1 << 63:
        return "an id or a stamp out of range"
    if is_too_far_ahead(head.hlc, now_s):
        return "a stamp more than 60 s ahead of this node's clock: set the clocks"
    if head.deleted:
        return "a tombstone with contents" if operation.content or operation.spans or operation.vectors or head.chunks else None
    if entry.id == FILES_ID:
        whole = not operation.spans and not operation.vectors and head.doc_id == file_id(head.name, operation.content)
        return None if whole and head.size_bytes == len(operation.content) else "a file that does not match its id"
    if len(operation.spans) != head.chunks or len(operation.vectors) != 2 * dim * head.chunks:
        return f"{head.chunks} chunks with {len(operation.spans)} spans and {len(operation.vectors)} bytes of vectors"
    if any(not 0 <= start < end or len(text) != end - start for start, end, text in operation.spans):
        return "a span that does not match its text"
    try:
        from_wire(operation.vectors, dim)
    except ValueError as error:
        return str(error)
    return None


def check_shards(shards: list[int]) -> list[int]:
    """Raises BadRequest for a number that is no shard."""
    if any(not 0 <= shard < SHARDS for shard in shards):
        raise BadRequest(f"expected shards below {SHARDS}, got {shards}")
    return shards
