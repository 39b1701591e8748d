"""What the document service takes and gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A document. Its id is `file-` and 24 hex digits of a digest of its name and bytes: one file, one id, on every node."""

    id: str
    name: str
    size_bytes: int
    created_at: int  # Unix seconds
    rev: str  # digest of content, chunker and embedder: unchanged means nothing to do
    chunks: int = 0  # 0: not in this store, only uploaded


@dataclass(frozen=True, slots=True)
class StoreInfo:
    id: str  # `vs_` and 24 hex digits of a digest of the name
    name: str
    created_at: int
    documents: int
    chunks: int
    shards: int
    replicas: int  # live owners of the least replicated shard
    in_sync: bool  # all live owners' digests agree, as far as gossip has brought them


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved chunk. `start` and `end` are characters in the document's text."""

    file_id: str
    filename: str
    text: str
    start: int
    end: int
    score: float  # fused; higher is better


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`shards_ok` below `shards_total` means that part of the index did not answer: never silently partial."""

    store: str
    passages: tuple[Passage, ...]
    digest: str  # of the index contents that answered
    shards_ok: int
    shards_total: int
