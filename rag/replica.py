"""What one node holds of a store, and what two nodes must exchange to hold the same. No I/O.

Each document is a last-writer-wins register on (hybrid clock, node); a delete is such a write too (a tombstone),
so an older copy that comes back from a partition loses. Merging is commutative, associative and idempotent:
the order and number of messages do not matter. Tombstones are kept: that is what "never comes back" costs.

A shard is summed up by a digest that does not depend on order: the number of entries and the sum, modulo 2^64,
of a hash of each. Equal digests cost nothing more; unequal ones cost a listing of (document, stamp).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from mesh.ids import NodeId
from rag.clock import HybridTimestamp

SHARDS = 8
_SUM_MASK = (1 << 64) - 1


def shard_of(doc_id: str) -> int:
    """The shard that all chunks of a document live in: replacing a document is one local transaction."""
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8).digest(), "big") % SHARDS


class DocumentHead(msgspec.Struct, frozen=True, array_like=True):
    """All of a document but its content: one entry of the register map."""

    doc_id: str
    hlc: int
    node: NodeId
    deleted: bool = False
    name: str = ""
    size_bytes: int = 0
    created_at: int = 0  # Unix seconds
    rev: str = ""
    chunks: int = 0

    @property
    def stamp(self) -> HybridTimestamp:
        return HybridTimestamp(self.hlc, self.node)


class ShardDigest(msgspec.Struct, frozen=True, array_like=True):
    """A shard in a few bytes. `entries` counts tombstones, `documents` does not."""

    entries: int = 0
    total: int = 0  # sum of entry hashes modulo 2^64
    documents: int = 0
    chunks: int = 0
    newest: int = 0  # greatest hlc

    def agrees(self, other: ShardDigest) -> bool:
        return self.entries == other.entries and self.total == other.total


class ListingEntry(msgspec.Struct, frozen=True, array_like=True):
    """One line of a shard's listing."""

    doc_id: str
    hlc: int
    node: NodeId


EMPTY = ShardDigest()


def entry_hash(head: DocumentHead) -> int:
    """64 bits of the entry: equal for equal documents at equal stamps, on every machine."""
    text = f"{head.doc_id}\0{head.hlc}\0{head.node}\0{int(head.deleted)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Replica:
    """The heads of one store as this node holds them, by shard, with running digests."""

    def __init__(self, heads: Iterable[DocumentHead] = ()) -> None:
        self._heads: list[dict[str, DocumentHead]] = [{} for _ in range(SHARDS)]
        self._digests: list[ShardDigest] = [EMPTY] * SHARDS
        for head in heads:
            self.merge(head)

    def get(self, doc_id: str) -> DocumentHead | None:
        return self._heads[shard_of(doc_id)].get(doc_id)

    def is_news(self, head: DocumentHead) -> bool:
        """Whether merging would change anything."""
        held = self.get(head.doc_id)
        return held is None or head.stamp > held.stamp

    def merge(self, head: DocumentHead) -> bool:
        """Takes the entry if it is newer than the one held; the only way in. True if it changed something."""
        if not self.is_news(head):
            return False
        shard = shard_of(head.doc_id)
        held = self._heads[shard].get(head.doc_id)
        self._heads[shard][head.doc_id] = head
        digest = self._digests[shard]
        self._digests[shard] = ShardDigest(
            entries=digest.entries + (held is None),
            total=(digest.total + entry_hash(head) - (entry_hash(held) if held else 0)) & _SUM_MASK,
            documents=digest.documents + (not head.deleted) - (held is not None and not held.deleted),
            chunks=digest.chunks + head.chunks - (held.chunks if held else 0),
            newest=max(digest.newest, head.hlc),
        )
        return True

    def forget(self, shard: int) -> None:
        """Drops a shard that other nodes own and hold whole."""
        self._heads[shard] = {}
        self._digests[shard] = EMPTY

    def forget_until(self, hlc: int) -> None:
        """Drops all entries written at or before `hlc`: their store was deleted then."""
        kept = [head for heads in self._heads for head in heads.values() if head.hlc > hlc]
        self.__init__(kept)  # type: ignore[misc]

    def digest(self, shard: int) -> ShardDigest:
        return self._digests[shard]

    def digests(self) -> dict[int, ShardDigest]:
        """Digests of the shards that hold anything."""
        return {shard: digest for shard, digest in enumerate(self._digests) if digest.entries}

    def documents(self, shards: Iterable[int]) -> list[DocumentHead]:
        """The live documents of these shards, by id."""
        heads = (head for shard in shards for head in self._heads[shard].values() if not head.deleted)
        return sorted(heads, key=lambda head: head.doc_id)

    def listing(self, shard: int) -> list[ListingEntry]:
        return [ListingEntry(head.doc_id, head.hlc, head.node) for head in self._heads[shard].values()]

    def wanted(self, shard: int, theirs: Iterable[ListingEntry]) -> list[str]:
        """Documents to ask of a peer with this listing, oldest first.

        Oldest first, so that our `newest` reaches theirs only once we have it all: until then we know that we are behind.
        """
        held = self._heads[shard]
        news = [line for line in theirs if shard_of(line.doc_id) == shard and _newer(line, held.get(line.doc_id))]
        return [line.doc_id for line in sorted(news, key=lambda line: (line.hlc, line.node))]

    def surplus(self, shard: int, theirs: Iterable[ListingEntry]) -> list[str]:
        """Documents that a peer with this listing lacks or holds older, oldest first."""
        listed = {line.doc_id: HybridTimestamp(line.hlc, line.node) for line in theirs}
        ours = [head for head in self._heads[shard].values() if head.doc_id not in listed or head.stamp > listed[head.doc_id]]
        return [head.doc_id for head in sorted(ours, key=lambda head: head.stamp)]


def _newer(line: ListingEntry, held: DocumentHead | None) -> bool:
    return held is None or HybridTimestamp(line.hlc, line.node) > held.stamp
