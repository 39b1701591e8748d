"""The store of record: one SQLite file for each store that a node holds parts of.

One file a store rather than one a shard: a search is then one pass over one full-text index rather than eight, a
document's registers, text, vectors and index entries are committed together, and a node keeps a few files open
rather than hundreds. Nothing else depends on it: shards are a column.

A write is acknowledged after COMMIT with WAL and synchronous=FULL: it survives kill -9 and loss of power. The file
is checked at open; what SQLite calls corrupt is never written to. Every chunk's terms are in an FTS5 index; lookups
go through its vocabulary table with bound parameters, so no client's text is ever read as FTS5's query language.

All methods block: call them in a worker thread, one at a time for each object.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mesh.errors import MeshError, Refused
from mesh.ids import NodeId
from rag.replica import DocumentHead, shard_of
from rag.wire import Operation

SCHEMA_VERSION = 1
TOKENIZER = "porter unicode61 remove_diacritics 2"
SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE documents (
    doc_id TEXT PRIMARY KEY, shard INTEGER NOT NULL, hlc INTEGER NOT NULL, node TEXT NOT NULL, deleted INTEGER NOT NULL,
    name TEXT NOT NULL, size_bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, rev TEXT NOT NULL, chunks INTEGER NOT NULL
);
CREATE TABLE contents (doc_id TEXT PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE passages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, doc_id TEXT NOT NULL, shard INTEGER NOT NULL, ordinal INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, text TEXT NOT NULL, vector BLOB NOT NULL
);
CREATE INDEX passages_of ON passages (doc_id, ordinal);
CREATE VIRTUAL TABLE terms USING fts5(text, content='passages', content_rowid='id', tokenize='{TOKENIZER}');
CREATE VIRTUAL TABLE term_uses USING fts5vocab('terms', 'instance');
"""
_HEAD_COLUMNS = "doc_id, hlc, node, deleted, name, size_bytes, created_at, rev, chunks"

_UNWRITTEN = frozenset(
    [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY]
)


class StoreCorrupt(MeshError):
    """A store's file is not what was written. It is left untouched; nothing was answered from it."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into ours.

    Raises:
        Refused: no space, or the disk failed; nothing of the transaction was kept and it may be tried again.
        StoreCorrupt: the file is damaged.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _UNWRITTEN:
            raise Refused(f"cannot write {path.name}: {error}; nothing was stored, free some space", 5.0) from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise StoreCorrupt(f"{path.name} is damaged: {error}; move it away and the peers' copies refill it") from error
        raise


def connect(path: Path) -> sqlite3.Connection:
    """A connection for one thread at a time, in autocommit: transactions are ours to begin."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA schema_version").fetchone()  # reads the file: noise is found here
    except BaseException:
        connection.close()
        raise
    return connection


class StoreFile:
    """The writing side of one store's file; `rag.index.Index` is the searching side."""

    def __init__(self, path: Path, embedder: str) -> None:
        self.path = path
        self._embedder = embedder
        self._connection: sqlite3.Connection | None = None

    def open(self) -> list[DocumentHead]:
        """Opens or creates the file, checks it, and returns all its heads.

        Raises:
            StoreCorrupt: damaged, of another version, or of another embedder.
            Refused: it cannot be opened or written.
        """
        with storage_errors(self.path):
            self._connection = connection = connect(self.path)
            try:
                self._check(connection)
                return [_head(row) for row in connection.execute(f"SELECT {_HEAD_COLUMNS} FROM documents")]
            except BaseException:
                self.close()
                raise

    def _check(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        if not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            connection.executescript("BEGIN;" + SCHEMA + "COMMIT;")
            meta = (("version", str(SCHEMA_VERSION)), ("embedder", self._embedder))
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta)
            return
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise StoreCorrupt(f"{self.path.name} is damaged: {verdict}")
        meta_held = dict(connection.execute("SELECT key, value FROM meta"))
        if meta_held != {"version": str(SCHEMA_VERSION), "embedder": self._embedder}:
            raise StoreCorrupt(f"{self.path.name} was written by another version or embedder: {meta_held}")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise Refused(f"{self.path.name} is not open on this node", 1.0)
        return self._connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._db
        with storage_errors(self.path):
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back when the disk is full
                    connection.execute("ROLLBACK")
                raise

    def write(self, operations: Sequence[Operation]) -> None:
        """Stores the operations, all or none; on return they are on disk. Each replaces what its document had.

        The caller has decided, by `Replica.is_news`, that they are newer than what is held.
        """
        with self._transaction() as connection:
            for operation in operations:
                self._replace(connection, operation)

    def _replace(self, connection: sqlite3.Connection, operation: Operation) -> None:
        head = operation.head
        shard = shard_of(head.doc_id)
        self._remove(connection, head.doc_id)
        row = (head.doc_id, shard, head.hlc, head.node, int(head.deleted), head.name, head.size_bytes, head.created_at)
        connection.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, head.rev, head.chunks))
        if operation.content:
            connection.execute("INSERT INTO contents VALUES (?, ?)", (head.doc_id, operation.content))
        width = len(operation.vectors) // max(len(operation.spans), 1)
        for ordinal, (start, end, text) in enumerate(operation.spans):
            vector = operation.vectors[ordinal * width : (ordinal + 1) * width]
            cursor = connection.execute(
                "INSERT INTO passages (doc_id, shard, ordinal, first, last, text, vector) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (head.doc_id, shard, ordinal, start, end, text, vector),
            )
            connection.execute("INSERT INTO terms (rowid, text) VALUES (?, ?)", (cursor.lastrowid, text))

    def _remove(self, connection: sqlite3.Connection, doc_id: str) -> None:
        # An external-content index is given the old text; it cannot look it up once the row is gone.
        connection.execute(
            "INSERT INTO terms (terms, rowid, text) SELECT 'delete', id, text FROM passages WHERE doc_id = ?", (doc_id,)
        )
        connection.execute("DELETE FROM passages WHERE doc_id = ?", (doc_id,))
        connection.execute("DELETE FROM contents WHERE doc_id = ?", (doc_id,))
        connection.execute("DELETE FROM documents WHERE doc_id = ?", (doc_id,))

    def forget(self, shards: Iterable[int]) -> None:
        """Drops whole shards, tombstones included: other nodes hold them."""
        wanted = list(shards)
        with self._transaction() as connection:
            for shard in wanted:
                self._remove_all(connection, "SELECT doc_id FROM documents WHERE shard = ?", shard)

    def forget_until(self, hlc: int) -> None:
        """Drops what was written at or before `hlc`: the store was deleted then."""
        with self._transaction() as connection:
            self._remove_all(connection, "SELECT doc_id FROM documents WHERE hlc <= ?", hlc)

    def _remove_all(self, connection: sqlite3.Connection, query: str, value: int) -> None:
        for (doc_id,) in connection.execute(query, (value,)).fetchall():
            self._remove(connection, doc_id)

    def content(self, doc_id: str) -> bytes | None:
        with storage_errors(self.path):
            row = self._db.execute("SELECT content FROM contents WHERE doc_id = ?", (doc_id,)).fetchone()
        return None if row is None else bytes(row[0])

    def operations(self, doc_ids: Iterable[str], limit_bytes: int) -> list[Operation]:
        """The documents as they were written, in the order asked, as many as fit and at least one; unknown ones are left out."""
        found: list[Operation] = []
        weight = 0
        with storage_errors(self.path):
            for doc_id in doc_ids:
                operation = self._operation(doc_id)
                if operation is None:
                    continue
                weight += operation.weight_bytes
                if found and weight > limit_bytes:
                    break
                found.append(operation)
        return found

    def _operation(self, doc_id: str) -> Operation | None:
        db = self._db
        row = db.execute(f"SELECT {_HEAD_COLUMNS} FROM documents WHERE doc_id = ?", (doc_id,)).fetchone()
        if row is None:
            return None
        content = db.execute("SELECT content FROM contents WHERE doc_id = ?", (doc_id,)).fetchone()
        query = "SELECT first, last, text, vector FROM passages WHERE doc_id = ? ORDER BY ordinal"
        chunks = db.execute(query, (doc_id,)).fetchall()
        return Operation(
            _head(row),
            bytes(content[0]) if content else b"",
            tuple((start, end, text) for start, end, text, _ in chunks),
            b"".join(vector for *_, vector in chunks),
        )


def _head(row: tuple[str, int, str, int, str, int, int, str, int]) -> DocumentHead:
    doc_id, hlc, node, deleted, name, size_bytes, created_at, rev, chunks = row
    return DocumentHead(doc_id, hlc, NodeId(node), bool(deleted), name, size_bytes, created_at, rev, chunks)
