"""What this node holds: the registry of stores and, for each store, its file, its heads and its index.

The loop's side of the disk. SQLite works in threads, one writer and one reader at a time for each file; heads
change only after their commit, so what peers are sent is always on disk. A damaged file is moved aside, never
written to and never answered from: the node starts that store empty and peers' copies refill it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import structlog
import trio
from numpy.typing import NDArray

from mesh.errors import BadRequest
from mesh.ids import NodeId
from rag.clock import HybridClock
from rag.index import Index
from rag.registry import FILES, Registry, StoreEntry
from rag.replica import Replica, ShardDigest
from rag.search import ShardResult, ShardStats, from_wire
from rag.store import StoreCorrupt, StoreFile, connect, storage_errors
from rag.wire import Operation, Summary, flaw_of

log = structlog.get_logger()


@dataclass(slots=True)
class OpenStore:
    """One store as held here."""

    file: StoreFile
    replica: Replica
    index: Index | None = None
    writing: trio.Lock = field(default_factory=trio.Lock)
    reading: trio.Lock = field(default_factory=trio.Lock)


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """`accepted` counts operations that are durable here, those that changed nothing included."""

    accepted: int
    changed: int
    rejected: tuple[str, ...] = ()


class LocalStores:
    def __init__(self, me: NodeId, directory: Path, embedder: str, dim: int, now: Callable[[], float]) -> None:
        self.clock = HybridClock(me)
        self.registry = Registry()
        self.damaged: list[str] = []  # files that were moved aside
        self.changes = 0  # grows with whatever changes the summary
        self._directory = directory
        self._embedder = embedder
        self._dim = dim
        self._now = now
        self._opened_stores: dict[str, OpenStore] = {}
        self._registry_db: sqlite3.Connection | None = None
        self._registering = trio.Lock()
        self._opening = trio.Lock()

    # -- files

    async def open(self) -> None:
        """Reads everything that this node held when it stopped.

        Raises:
            Refused, OSError: the directory cannot be used.
        """
        entries = await trio.to_thread.run_sync(self._open_registry)
        for entry in entries:
            self.registry.merge(entry)
            self.clock.observe(max(entry.hlc, entry.died))
        for entry in (FILES, *self.registry.live()):
            if self._path(entry.id).exists():
                opened_store = await self._opened_store(entry)
                for digest in opened_store.replica.digests().values():
                    self.clock.observe(digest.newest)

    def _open_registry(self) -> list[StoreEntry]:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "registry.sqlite"
        try:
            entries = self._read_registry(path)
        except StoreCorrupt as error:
            self._set_aside(path, str(error))
            entries = self._read_registry(path)
        for entry in entries:
            if not entry.live:  # its documents were deleted with it
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{self._path(entry.id)}{suffix}").unlink(missing_ok=True)
        return entries

    def _read_registry(self, path: Path) -> list[StoreEntry]:
        with storage_errors(path):
            connection = connect(path)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS stores (id TEXT PRIMARY KEY, entry BLOB NOT NULL)")
                rows = connection.execute("SELECT entry FROM stores").fetchall()
                entries = [msgspec.msgpack.decode(row[0], type=StoreEntry) for row in rows]
            except msgspec.MsgspecError as error:
                connection.close()
                raise StoreCorrupt(f"{path.name} is damaged: {error}") from error
            except BaseException:
                connection.close()
                raise
        self._registry_db = connection
        return entries

    def _path(self, store: str) -> Path:
        return self._directory / f"{store}.sqlite"

    async def _opened_store(self, entry: StoreEntry) -> OpenStore:
        """The opened store; opened, or made, at first use."""
        async with self._opening:
            opened_store = self._opened_stores.get(entry.id)
            if opened_store is None:
                opened_store = await trio.to_thread.run_sync(self._open_shelf, entry)
                self._opened_stores[entry.id] = opened_store
                if entry.died:
                    opened_store.replica.forget_until(entry.died)
                self.changes += 1
        return opened_store

    def _open_shelf(self, entry: StoreEntry) -> OpenStore:
        path = self._path(entry.id)
        embedder = entry.embedder
        file = StoreFile(path, embedder)
        try:
            heads = file.open()
        except StoreCorrupt as error:
            self._set_aside(path, str(error))
            heads = file.open()
        if entry.died:
            file.forget_until(entry.died)
        return OpenStore(file, Replica(heads))

    def _set_aside(self, path: Path, reason: str) -> None:
        number = 1
        while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
            number += 1
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        self.damaged.append(aside.name)
        log.error("documents_file_damaged", file=path.name, moved_to=aside.name, reason=reason)

    def close(self) -> None:
        for opened_store in self._opened_stores.values():
            opened_store.file.close()
            if opened_store.index is not None:
                opened_store.index.close()
        self._opened_stores.clear()
        if self._registry_db is not None:
            self._registry_db.close()
            self._registry_db = None

    # -- stores

    async def register(self, entries: Iterable[StoreEntry]) -> bool:
        """Takes in entries, durably; a store that was deleted is emptied here. True if anything changed."""
        changed = False
        async with self._registering:
            for entry in entries:
                merged = self.registry.news(entry)
                if merged is None:
                    continue
                await trio.to_thread.run_sync(self._save_entry, merged)
                before = self.registry.get(entry.id)
                self.registry.merge(entry)
                self.clock.observe(max(entry.hlc, entry.died))
                changed = True
                self.changes += 1
                if merged.died > (before.died if before else 0):
                    await self._bury(merged)
        return changed

    def _save_entry(self, entry: StoreEntry) -> None:
        with storage_errors(self._directory / "registry.sqlite"):
            assert self._registry_db is not None, "open() comes first"
            self._registry_db.execute("INSERT OR REPLACE INTO stores VALUES (?, ?)", (entry.id, msgspec.msgpack.encode(entry)))

    async def _bury(self, entry: StoreEntry) -> None:
        """Drops what the store held up to its deletion."""
        opened_store = self._opened_stores.get(entry.id)
        if opened_store is None:
            return  # its file, if there is one, is emptied when it is next opened
        async with opened_store.writing, opened_store.reading:
            await trio.to_thread.run_sync(opened_store.file.forget_until, entry.died)
            opened_store.replica.forget_until(entry.died)

    # -- documents

    def replica(self, store: str) -> Replica | None:
        opened_store = self._opened_stores.get(store)
        return None if opened_store is None else opened_store.replica

    async def apply(self, entry: StoreEntry, operations: Sequence[Operation]) -> ApplyResult:
        """Stores what is new; on return all that is accepted is on disk."""
        await self.register([entry])
        held = self.registry.get(entry.id)
        if held is None:
            return ApplyResult(0, 0, ("a store that this node cannot take in",))
        now_s, rejected, sound = self._now(), [], []
        for operation in operations:
            flaw = flaw_of(operation, held, self._dim, now_s)
            if flaw is not None:
                rejected.append(flaw)
            elif not held.live or operation.head.hlc <= held.died:
                rejected.append("a store that was deleted")
            else:
                sound.append(operation)
        if not sound:
            return ApplyResult(0, 0, tuple(rejected))
        opened_store = await self._opened_store(held)
        async with opened_store.writing:
            latest: dict[str, Operation] = {}
            for operation in sorted(sound, key=lambda operation: operation.head.stamp):
                if opened_store.replica.is_news(operation.head):
                    latest[operation.head.doc_id] = operation
            if latest:
                await trio.to_thread.run_sync(opened_store.file.write, list(latest.values()))
                for operation in latest.values():
                    opened_store.replica.merge(operation.head)
                    self.clock.observe(operation.head.hlc)
                self.changes += 1
        return ApplyResult(len(sound), len(latest), tuple(rejected))

    async def forget(self, store: str, shard: int, known: ShardDigest) -> int:
        """Drops a shard that other nodes hold whole, if it still is as `known`. Returns how many shards were dropped."""
        opened_store = self._opened_stores.get(store)
        if opened_store is None:
            return 0
        async with opened_store.writing:
            if opened_store.replica.digest(shard) != known:
                return 0
            await trio.to_thread.run_sync(opened_store.file.forget, [shard])
            opened_store.replica.forget(shard)
            self.changes += 1
        return 1

    async def content(self, store: str, doc_id: str) -> bytes | None:
        opened_store = self._opened_stores.get(store)
        if opened_store is None:
            return None
        async with opened_store.writing:
            return await trio.to_thread.run_sync(opened_store.file.content, doc_id)

    async def operations(self, store: str, doc_ids: Sequence[str], limit_bytes: int) -> list[Operation]:
        opened_store = self._opened_stores.get(store)
        if opened_store is None:
            return []
        async with opened_store.writing:
            return await trio.to_thread.run_sync(opened_store.file.operations, doc_ids, limit_bytes)

    async def search(
        self, store: str, shards: Sequence[int], query: NDArray[np.float32] | None, text: str, depth: int
    ) -> ShardResult:
        opened_store = self._opened_stores.get(store)
        if opened_store is None:
            return ShardResult((), tuple(ShardStats(shard, 0, 0, ()) for shard in shards), ())
        async with opened_store.reading:
            digests = {shard: opened_store.replica.digest(shard) for shard in shards}
            if opened_store.index is None:
                opened_store.index = await trio.to_thread.run_sync(Index, opened_store.file.path, self._dim)
            answer = await trio.to_thread.run_sync(opened_store.index.search, shards, query, text, depth)
        stats = []
        for part in answer.stats:
            digest = digests[part.shard]
            stats.append(msgspec.structs.replace(part, entries=digest.entries, total=digest.total))
        return msgspec.structs.replace(answer, stats=tuple(stats))

    def query_vector(self, raw: bytes) -> NDArray[np.float32] | None:
        """A query's vector as it travels, [dim]; None for none.

        Raises:
            BadRequest: not one unit vector.
        """
        if not raw:
            return None
        try:
            vectors = from_wire(raw, self._dim)
        except ValueError as error:
            raise BadRequest(f"query vector: {error}") from None
        if len(vectors) != 1:
            raise BadRequest(f"expected one query vector, got {len(vectors)}")
        vector: NDArray[np.float32] = vectors[0]
        return vector

    def summary(self) -> Summary:
        """All that this node would tell of its stores."""
        digests = {}
        for store, opened_store in self._opened_stores.items():
            held = {str(shard): digest for shard, digest in opened_store.replica.digests().items()}
            if held:
                digests[store] = held
        return Summary(self.registry.entries(), digests)
