"""Ranking: exact dense scores, BM25 with statistics of the whole store, one reciprocal-rank fusion. Pure.

Every replica and every grouping of shards over nodes gives the same bits:
- A dense score is the dot product of two unit vectors of f16 numbers. Each product is a multiple of 2^-48 and
  every partial sum lies below 2^5, so float64 holds all of them exactly: order, BLAS and machine do not matter.
- A shard picks its lexical candidates by its own statistics, a function of its contents alone; the asking node
  scores them again with the statistics of all shards, so small shards do not distort rare terms.
- Ties go to the lower (document, chunk).
Fusion: Cormack et al. 2009, with k = 10 (measured better than 60 on three collections).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

K1, B = 1.2, 0.75  # as SQLite's own bm25()
FUSION_K = 10
MIN_DEPTH = 50  # candidates of each kind that enter the fusion
REPEAT_WEIGHT = 0.9  # of each further passage of a document that already has one in the answer
OVERLAP_SHARE = 0.5  # of a passage that may already be in the answer


class ChunkCandidate(msgspec.Struct, frozen=True, array_like=True):
    """A chunk that may be in the answer. `dense` is None and `counts` empty where it was not picked on that ground."""

    doc_id: str
    ordinal: int
    name: str
    start: int
    end: int
    text: str
    dense: float | None
    counts: tuple[int, ...]  # of each of the answer's terms in this chunk
    length: int  # terms in the chunk

    @property
    def key(self) -> tuple[str, int]:
        return self.doc_id, self.ordinal


class ShardStats(msgspec.Struct, frozen=True, array_like=True):
    """What BM25 needs to know of a shard, and the digest of what answered."""

    shard: int
    chunks: int
    length: int  # terms in all chunks
    holding: tuple[int, ...]  # chunks that hold each of the answer's terms
    entries: int = 0
    total: int = 0


class ShardResult(msgspec.Struct, frozen=True, array_like=True):
    terms: tuple[str, ...]  # of the query, sorted
    stats: tuple[ShardStats, ...]
    candidates: tuple[ChunkCandidate, ...]


class Ranked(msgspec.Struct, frozen=True):
    candidate: ChunkCandidate
    score: float


def depth_for(top_k: int) -> int:
    return max(MIN_DEPTH, 2 * top_k)


def to_wire(vectors: NDArray[np.float32]) -> bytes:
    """Unit vectors [n, dim] as little-endian f16 bytes."""
    return vectors.astype("<f2").tobytes()


def from_wire(raw: bytes, dim: int) -> NDArray[np.float32]:
    """f16 bytes as [n, dim]; the bytes of unit vectors within f16's rounding.

    Raises:
        ValueError: not a whole number of vectors, or not of length one (infinite and NaN included).
    """
    if len(raw) % (2 * dim):
        raise ValueError(f"expected a multiple of {2 * dim} bytes of vectors, got {len(raw)}")
    vectors = np.frombuffer(raw, "<f2").astype(np.float32).reshape(-1, dim)
    squares = np.einsum("ij,ij->i", vectors, vectors)
    if not bool(np.all(np.abs(squares - 1.0) < 0.02)):
        raise ValueError("expected vectors of length 1")
    return vectors


def dense_top(
    matrix: NDArray[np.float32], query: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows [n, dim] that may be among the best `count` for the query [dim], with exact scores; unsorted, no fewer than asked.

    A fast float32 pass picks the rows; the margin is far above its rounding error, so no row is lost to it.
    """
    rows = matrix.shape[0]
    if rows > count:
        rough = matrix @ query  # [n]
        least = np.partition(rough, rows - count)[rows - count]
        picked = np.flatnonzero(rough >= least - 1e-4)
    else:
        picked = np.arange(rows)
    return picked.astype(np.int64), matrix[picked].astype(np.float64) @ query.astype(np.float64)


def idf(chunks: int, holding: int) -> float:
    """Robertson's weight of a term; kept positive, as in SQLite, for terms that most chunks hold."""
    return max(math.log((chunks - holding + 0.5) / (holding + 0.5)), 1e-6)


def bm25(counts: Sequence[int], length: int, weights: Sequence[float], mean_length: float) -> float:
    """The chunk's score; rounded, so that machines whose `log` differs in the last bit agree."""
    norm = K1 * (1 - B + B * length / mean_length) if mean_length else K1
    return round(sum(weight * count * (K1 + 1) / (count + norm) for count, weight in zip(counts, weights) if count), 9)


def bm25_rows(
    counts: NDArray[np.int64], lengths: NDArray[np.int64], weights: Sequence[float], mean_length: float
) -> NDArray[np.float64]:
    """`bm25` of many chunks: counts [n, terms], lengths [n] -> [n]."""
    norm = K1 * (1 - B + B * lengths / max(mean_length, 1e-9))  # [n]
    parts = counts * (K1 + 1) / (counts + norm[:, None]) * np.asarray(weights)
    total = np.zeros(len(lengths))
    for column in range(parts.shape[1]):  # term by term: the order of additions is fixed
        total += parts[:, column]
    return np.round(total, 9)


def dense_ranking(answers: Iterable[ShardResult], depth: int) -> list[ChunkCandidate]:
    found = [candidate for answer in answers for candidate in answer.candidates if candidate.dense is not None]
    return sorted(found, key=lambda candidate: (-(candidate.dense or 0.0), candidate.key))[:depth]


def lexical_ranking(answers: Sequence[ShardResult], depth: int) -> list[ChunkCandidate]:
    stats = [shard for answer in answers for shard in answer.stats]
    chunks, length = sum(shard.chunks for shard in stats), sum(shard.length for shard in stats)
    holding: dict[str, int] = {}
    for answer in answers:
        for shard in answer.stats:
            for term, count in zip(answer.terms, shard.holding):
                holding[term] = holding.get(term, 0) + count
    scored = []
    for answer in answers:
        weights = [idf(chunks, holding.get(term, 0)) for term in answer.terms]
        for candidate in answer.candidates:
            if any(candidate.counts):
                scored.append((bm25(candidate.counts, candidate.length, weights, length / max(chunks, 1)), candidate))
    scored.sort(key=lambda pair: (-pair[0], pair[1].key))
    return [candidate for _, candidate in scored[:depth]]


def fuse(answers: Sequence[ShardResult], top_k: int, *, embedding_weight: float = 1.0, text_weight: float = 1.0) -> list[Ranked]:
    """The best passages over all shards: `weight / (10 + rank)` summed over the two rankings, scaled to at most 1."""
    depth = depth_for(top_k)
    total = embedding_weight + text_weight
    scores: dict[tuple[str, int], float] = {}
    candidates: dict[tuple[str, int], ChunkCandidate] = {}
    rankings = ((embedding_weight, dense_ranking(answers, depth)), (text_weight, lexical_ranking(answers, depth)))
    for weight, ranking in rankings:
        if weight <= 0:
            continue
        for rank, candidate in enumerate(ranking, start=1):
            share = weight / total * (FUSION_K + 1) / (FUSION_K + rank)
            scores[candidate.key] = scores.get(candidate.key, 0.0) + share
            candidates.setdefault(candidate.key, candidate)
    ranked = [Ranked(candidates[key], score) for key, score in scores.items()]
    ranked.sort(key=lambda item: (-item.score, item.candidate.key))
    return diverse(ranked, top_k)


def diverse(ranked: Sequence[Ranked], top_k: int) -> list[Ranked]:
    """The first `top_k`, without what the answer already contains.

    A passage is left out if its text, or over half its span, is in the answer; each further passage of one document
    counts a little less, so that another document's near equal goes first. Scores themselves are not changed.
    """
    left = list(ranked)
    taken: list[Ranked] = []
    repeats: dict[str, int] = {}
    texts: set[str] = set()
    while left and len(taken) < top_k:
        worth = [item.score * REPEAT_WEIGHT ** repeats.get(item.candidate.doc_id, 0) for item in left]
        best = max(range(len(left)), key=lambda i: (worth[i], -i))
        item = left.pop(best)
        chunk = item.candidate
        if chunk.text in texts or any(_overlaps(chunk, other.candidate) for other in taken):
            continue
        taken.append(item)
        texts.add(chunk.text)
        repeats[chunk.doc_id] = repeats.get(chunk.doc_id, 0) + 1
    return sorted(taken, key=lambda item: (-item.score, item.candidate.key))


def _overlaps(chunk: ChunkCandidate, other: ChunkCandidate) -> bool:
    if chunk.doc_id != other.doc_id:
        return False
    shared = min(chunk.end, other.end) - max(chunk.start, other.start)
    return shared > OVERLAP_SHARE * min(chunk.end - chunk.start, other.end - other.start)


def contents_digest(stats: Mapping[int, tuple[int, int]]) -> str:
    """Names the index contents: of (entries, total) by shard. Equal on all nodes that hold the same documents."""
    lines = "".join(f"{shard}:{entries}:{total};" for shard, (entries, total) in sorted(stats.items()))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()
