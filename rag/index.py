"""The searching side of a store's file: vectors in memory, terms through FTS5's vocabulary, one snapshot a query.

Vectors are kept as float32 rows beside their keys and brought up to date from the file when another connection has
committed: new rows are read, removed ones dropped. Vectors, terms and texts of one query come from one read
transaction, so a document that is replaced meanwhile is seen whole, old or new.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rag import search
from rag.search import ChunkCandidate, ShardResult, ShardStats
from rag.store import TOKENIZER, connect, storage_errors

MAX_TERMS = 64  # of a query; further ones add cost and no meaning
STOP_TERMS = frozenset(
    """
    a an and are as at be by can did do doe for from had ha have how i if in into is it its me my no not of on or our
    she so that the their them there these they thi to wa we were what when where which who whom whi will with you your
    """.split()  # noqa: SIM905  (a list literal would be three times as long)
)
"""English function words as the tokenizer leaves them. A fixed list, not a threshold on counts: a threshold would make the
answer depend on which shards a node holds. They weigh almost nothing in BM25 and have the longest posting lists."""


class Tokenizer:
    """The terms of a text exactly as the index sees them: a scratch index in memory is asked."""

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._db.execute(f"CREATE VIRTUAL TABLE scratch USING fts5(text, tokenize='{TOKENIZER}')")
        self._db.execute("CREATE VIRTUAL TABLE words USING fts5vocab('scratch', 'row')")

    def terms(self, text: str) -> list[str]:
        """Distinct terms, sorted, the first `MAX_TERMS`; without function words unless there is nothing else."""
        self._db.execute("INSERT INTO scratch (rowid, text) VALUES (1, ?)", (text,))
        found = [term for (term,) in self._db.execute("SELECT term FROM words ORDER BY term")]
        self._db.execute("DELETE FROM scratch")
        return ([term for term in found if term not in STOP_TERMS] or found)[:MAX_TERMS]

    def close(self) -> None:
        self._db.close()


class Index:
    """Blocks: call it in a worker thread, one call at a time."""

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self._dim = dim
        with storage_errors(path):
            self._db = connect(path)
            self._db.execute("PRAGMA query_only = ON")
        self._tokenizer = Tokenizer()
        self._version = -1
        self._ids: NDArray[np.int64] = np.empty(0, np.int64)  # ascending
        self._shards: NDArray[np.int64] = np.empty(0, np.int64)
        self._lengths: NDArray[np.int64] = np.empty(0, np.int64)  # terms in each chunk
        self._vectors: NDArray[np.float32] = np.empty((0, dim), np.float32)
        self._keys: list[tuple[str, int]] = []

    def close(self) -> None:
        self._db.close()
        self._tokenizer.close()

    def search(self, shards: Sequence[int], query: NDArray[np.float32] | None, text: str, depth: int) -> ShardResult:
        """The best candidates of these shards: dense over all of them, lexical of each.

        `query` [dim] or None, and `text`, which may be empty, each leave their half out.

        Raises:
            Refused, StoreCorrupt: the file cannot be read.
        """
        with storage_errors(self.path):
            self._db.execute("BEGIN")
            try:
                self._refresh()
                return self._answer(sorted(set(shards)), query, text, depth)
            finally:
                self._db.execute("ROLLBACK")

    def _refresh(self) -> None:
        # The pragma is answered before the snapshot below is taken: a commit in between is merely seen again next time.
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        if version == self._version:
            return
        held = np.fromiter((row[0] for row in self._db.execute("SELECT id FROM passages ORDER BY id")), np.int64)
        keep = np.isin(self._ids, held, assume_unique=True)
        last = int(self._ids[-1]) if len(self._ids) else 0
        rows = self._db.execute(
            "SELECT p.id, p.shard, p.doc_id, p.ordinal, p.vector, d.sz FROM passages p JOIN terms_docsize d ON d.id = p.id "
            "WHERE p.id > ? ORDER BY p.id",
            (last,),
        ).fetchall()
        fresh = np.frombuffer(b"".join(row[4] for row in rows), "<f2").astype(np.float32).reshape(-1, self._dim)
        self._keys = [key for key, kept in zip(self._keys, keep) if kept] + [(row[2], row[3]) for row in rows]
        self._ids = np.concatenate([self._ids[keep], np.array([row[0] for row in rows], np.int64)])
        self._shards = np.concatenate([self._shards[keep], np.array([row[1] for row in rows], np.int64)])
        self._lengths = np.concatenate([self._lengths[keep], np.array([_varint(row[5]) for row in rows], np.int64)])
        self._vectors = np.concatenate([self._vectors[keep], fresh])
        self._version = version

    def _answer(self, shards: list[int], query: NDArray[np.float32] | None, text: str, depth: int) -> ShardResult:
        terms = self._tokenizer.terms(text) if text else []
        dense = self._dense(shards, query, depth) if query is not None else {}
        counts = self._counts(terms)  # [chunks, terms]
        lexical: set[int] = set()
        stats = []
        for shard in shards:
            inside = np.flatnonzero(self._shards == shard)
            holding = np.count_nonzero(counts[inside], axis=0)
            length = int(self._lengths[inside].sum())
            stats.append(ShardStats(shard, len(inside), length, tuple(int(count) for count in holding)))
            lexical.update(self._lexical(inside, counts, holding, length, depth))
        rows = sorted(dense.keys() | lexical)
        return ShardResult(tuple(terms), tuple(stats), tuple(self._candidates(rows, dense, lexical, counts)))

    def _dense(self, shards: list[int], query: NDArray[np.float32], depth: int) -> dict[int, float]:
        inside = np.flatnonzero(np.isin(self._shards, shards))
        matrix = self._vectors if len(inside) == len(self._ids) else self._vectors[inside]
        picked, scores = search.dense_top(matrix, query, depth)
        best = sorted(zip(inside[picked].tolist(), scores.tolist()), key=lambda pair: (-pair[1], self._keys[pair[0]]))
        return dict(best[:depth])

    def _counts(self, terms: list[str]) -> NDArray[np.int64]:
        """How often each chunk holds each term: [chunks, terms]."""
        counts = np.zeros((len(self._ids), len(terms)), np.int64)
        for column, term in enumerate(terms):
            rows = self._db.execute("SELECT doc FROM term_uses WHERE term = ?", (term,))
            uses = np.fromiter((row[0] for row in rows), np.int64)
            np.add.at(counts[:, column], np.searchsorted(self._ids, uses), 1)
        return counts

    def _lexical(
        self, inside: NDArray[np.int64], counts: NDArray[np.int64], holding: NDArray[np.int64], length: int, depth: int
    ) -> list[int]:
        """The best rows of one shard by its own statistics."""
        rows = inside[counts[inside].any(axis=1)] if counts.shape[1] else inside[:0]
        weights = [search.idf(len(inside), int(count)) for count in holding]
        scores = search.bm25_rows(counts[rows], self._lengths[rows], weights, length / max(len(inside), 1))
        ranked = sorted(zip(rows.tolist(), scores.tolist()), key=lambda pair: (-pair[1], self._keys[pair[0]]))
        return [row for row, _ in ranked[:depth]]

    def _candidates(
        self, rows: list[int], dense: dict[int, float], lexical: set[int], counts: NDArray[np.int64]
    ) -> list[ChunkCandidate]:
        found = []
        for row in rows:
            name, start, end, text = self._db.execute(
                "SELECT d.name, p.first, p.last, p.text FROM passages p JOIN documents d USING (doc_id) WHERE p.id = ?",
                (int(self._ids[row]),),
            ).fetchone()
            tally = tuple(counts[row].tolist()) if row in lexical else ()
            doc_id, ordinal = self._keys[row]
            found.append(ChunkCandidate(doc_id, ordinal, name, start, end, text, dense.get(row), tally, int(self._lengths[row])))
        return found


def _varint(raw: bytes) -> int:
    """The first number of an FTS5 `docsize` record: big-endian, seven bits a byte (SQLite's variable-length integer)."""
    value = 0
    for byte in raw:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            break
    return value
