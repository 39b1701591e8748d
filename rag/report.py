"""Reports of the document service: to clients, in gossip, and as figures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from rag import place, wire
from rag.peers import Peers
from rag.registry import FILES, StoreEntry
from rag.replica import SHARDS, ShardDigest
from rag.types import StoreInfo
from rag.wire import Summary

MAX_PUBLISHED_BYTES = 256 << 10  # a quarter of what a node may tell; beyond it peers ask for the rest


@dataclass(frozen=True, slots=True)
class DocumentStatistics:
    stores: int
    documents: int  # held here, as are chunks; uploaded files not counted
    chunks: int
    files: int
    searches_total: int
    partial_searches_total: int
    writes_total: int
    writes_refused_total: int
    rejected_operations_total: int
    repair_rounds_total: int
    repair_pulled_total: int
    repair_pushed_total: int
    repair_failed_total: int
    dropped_shards_total: int
    peer_calls_failed_total: int
    malformed_gossip_total: int
    damaged_files: int


def held_counts(summary: Summary, stores: int) -> dict[str, int]:
    """The figures of `DocumentStatistics` that a summary holds."""
    held = [digest for store, shards in summary.digests.items() if store != FILES.id for digest in shards.values()]
    files = summary.digests.get(FILES.id, {}).values()
    return {
        "stores": stores,
        "documents": sum(digest.documents for digest in held),
        "chunks": sum(digest.chunks for digest in held),
        "files": sum(digest.documents for digest in files),
    }


def store_info(entry: StoreEntry, peers: Peers) -> StoreInfo:
    """A store as far as this node and gossip know it: exact for shards held here."""
    live = set(peers.live())
    documents = chunks = 0
    replicas, in_sync = place.REPLICAS, True
    for shard in range(SHARDS):
        owners = [node for node in peers.owners(entry.id, shard) if node in live]
        digests = [peers.digest_at(node, entry.id, shard) for node in owners]
        here = peers.digest_here(entry.id, shard)
        best = max([*digests, here], key=lambda digest: (digest.newest, digest.entries), default=ShardDigest())
        documents += best.documents
        chunks += best.chunks
        replicas = min(replicas, len(owners))
        in_sync &= all(digest.agrees(best) for digest in digests)
    return StoreInfo(entry.id, entry.name, entry.created_at, documents, chunks, SHARDS, replicas, in_sync)


def published(summary: Summary) -> dict[str, object]:
    """The summary for gossip, in plain values; only its name where it would be too large."""
    raw = wire.ENCODER.encode(summary)
    if len(raw) > MAX_PUBLISHED_BYTES:
        summary = Summary(brief=hashlib.blake2b(raw, digest_size=8).hexdigest())
    return wire.header_of(summary)
