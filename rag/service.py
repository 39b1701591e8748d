"""The document service of one node: what HTTP asks of it, and its life.

`Documents` turns files into passages, writes them to their owners, searches over all shards and keeps copies whole
in the background. Uploaded files live in a reserved store of their own; attaching one to a store parses, chunks and
embeds it there under the file's id. All of it works on every node, whichever took the write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from mesh.errors import BadRequest, Refused
from mesh.ids import NodeId
from mesh.view import View
from mesh.wire.calls import Call, CallReply, Handler, Handlers, Header
from rag import chunk, parse, search, wire
from rag.answers import Answers
from rag.embed import Embedder
from rag.local import LocalStores
from rag.peers import Peers
from rag.reading import ShardReply
from rag.registry import FILES, MAX_STORES, StoreEntry, check_name, store_id
from rag.repair import Repair
from rag.replica import SHARDS, DocumentHead
from rag.report import DocumentStatistics, held_counts, published, store_info
from rag.search import ShardResult
from rag.sweep import sweep
from rag.types import FileInfo, Passage, SearchResult, StoreInfo
from rag.wire import Operation

log = structlog.get_logger()

PUBLISH_EVERY_S = 0.2
MAX_TOP_K = 100
MAX_QUERY_CHARS = 20_000
EMBED_BATCH = 16  # between batches a query gets its turn


class Documents:
    def __init__(
        self,
        me: NodeId,
        directory: Path,
        embedder: Embedder,
        view: Callable[[], View],
        call: Call,
        publish: Callable[[dict[str, object]], None],
        now: Callable[[], float],
    ) -> None:
        """`now` gives Unix seconds; `publish` gets what goes into `Facts.documents`, whenever it changes."""
        self._me = me
        self._embedder = embedder
        self._publish = publish
        self._now = now
        self._local = LocalStores(me, directory, embedder.identity, embedder.dim, now)
        self._peers = Peers(me, self._local, view, call, now)
        self._answers = Answers(self._local, self._peers)
        self._repair = Repair(me, self._local, self._peers)
        self._open = trio.Event()
        self._embedding = trio.CapacityLimiter(1)
        self._querying = trio.CapacityLimiter(1)
        self._searches = self._partial = self._writes = self._refused = 0

    # -- life

    @property
    def handlers(self) -> Handlers:
        """Answers to peers' calls, by kind; those that come before `run` has opened the files are refused."""

        def guarded(handler: Handler) -> Handler:
            async def answer(sender: NodeId, header: Header, tail: bytes) -> CallReply:
                if not self._open.is_set():
                    raise Refused("this node is opening its documents", 1.0)
                return await handler(sender, header, tail)

            return answer

        return {kind: guarded(handler) for kind, handler in self._answers.handlers.items()}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Opens what is on disk, then repairs and publishes until cancelled.

        Raises:
            Refused, OSError: the directory cannot be used.
        """
        try:
            await self._local.open()
            self._open.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce)
                nursery.start_soon(self._repair.run)
                nursery.start_soon(sweep, self._local, self._peers, self._bury)
                task_status.started()
        finally:
            self._open = trio.Event()
            self._local.close()

    async def _announce(self) -> None:
        published_changes = -1
        while True:
            if self._local.changes != published_changes:
                published_changes = self._local.changes
                self._publish(published(self._local.summary()))
            await trio.sleep(PUBLISH_EVERY_S)

    # -- stores

    async def create_store(self, name: str) -> StoreInfo:
        """A store of this name, new or as it is.

        Raises:
            BadRequest: the name, or too many stores.
            Refused: no quorum.
        """
        await self._open.wait()
        check_name(name)
        held = self._local.registry.get(store_id(name))
        if held is None or not held.live:
            if held is None and len(self._local.registry.entries()) >= MAX_STORES:
                raise BadRequest(f"this mesh has had {MAX_STORES} stores, no more are taken", "name")
            stamp, now_s = self._local.clock.next(self._now()), self._now()
            died = held.died if held else 0
            await self._peers.register(
                StoreEntry(store_id(name), name, int(now_s), self._embedder.identity, stamp.hlc, stamp.node, died)
            )
        return self.store(name)

    def stores(self) -> list[StoreInfo]:
        return [store_info(entry, self._peers) for entry in self._local.registry.live()]

    def store(self, store: str) -> StoreInfo:
        """Raises BadRequest (404) when unknown."""
        return store_info(self._local.registry.find(store), self._peers)

    async def delete_store(self, store: str) -> None:
        """Raises BadRequest (404) when unknown, Refused without a quorum."""
        await self._open.wait()
        entry = self._local.registry.find(store)
        stamp = self._local.clock.next(self._now())
        await self._peers.register(msgspec.structs.replace(entry, died=stamp.hlc))

    # -- files

    async def put_file(self, name: str, content: bytes) -> FileInfo:
        """Stores an uploaded file; the same name and bytes are the same file.

        Raises:
            BadRequest: a type that is not read, too large, or not text.
            Refused: no quorum, or no space.
        """
        await self._open.wait()
        await trio.to_thread.run_sync(parse.text_of, name, content)
        identifier = wire.file_id(name, content)
        held = (await self._peers.heads([(FILES.id, identifier)])).get(FILES.id, identifier)
        if held is not None and not held.deleted:
            return _info(held)
        rev = hashlib.blake2b(content, digest_size=12).hexdigest()
        head = self._head(identifier, name=name, size_bytes=len(content), rev=rev)
        await self._write(FILES, Operation(head, content))
        return _info(head)

    async def files(self) -> list[FileInfo]:
        return await self._list(FILES)

    async def file(self, file_id: str) -> tuple[FileInfo, bytes]:
        """Raises BadRequest (404) when unknown, Refused when no live node can give its bytes."""
        head = await self._file_head(file_id)
        operation = await self._peers.operation(FILES, head)
        if operation is None:
            raise Refused(f"no live node holds the bytes of {file_id} now", 2.0)
        if operation.head.deleted:
            raise _unknown_file(file_id)
        return _info(operation.head), operation.content

    async def delete_file(self, file_id: str) -> None:
        """Out of the files and out of every store.

        Raises BadRequest (404) when unknown, Refused without a quorum: do it again.
        """
        head = await self._file_head(file_id)
        entries = self._local.registry.live()
        heads = await self._peers.heads([(entry.id, file_id) for entry in entries])
        for entry in entries:
            held = heads.get(entry.id, file_id)
            # An owner that did not answer may hold it: a tombstone where nothing was costs less than a ghost.
            if (held is not None and not held.deleted) or (held is None and not heads.complete):
                await self._bury(entry, file_id)
        await self._bury(FILES, head.doc_id)

    async def _bury(self, entry: StoreEntry, doc_id: str) -> None:
        await self._write(entry, Operation(self._head(doc_id, deleted=True)))

    async def _file_head(self, file_id: str) -> DocumentHead:
        await self._open.wait()
        heads = await self._peers.heads([(FILES.id, file_id)])
        head = heads.get(FILES.id, file_id)
        if head is None and not heads.certain:
            raise Refused(f"too few owners of {file_id} answer to say whether it exists", 2.0)
        if head is None or head.deleted:
            raise _unknown_file(file_id)
        return head

    # -- files in stores

    async def attach(self, store: str, file_id: str) -> FileInfo:
        """Chunks, embeds and indexes the file in the store; nothing to do when that was done with the same rules.

        Raises:
            BadRequest: store or file unknown (404), or the store's vectors are of another embedder.
            Refused: no quorum, or no space.
        """
        await self._open.wait()
        entry = self._local.registry.find(store)
        self._check_embedder(entry)
        file, content = await self.file(file_id)
        rev = hashlib.blake2b(f"{file.rev}\0{chunk.CHUNKER}\0{entry.embedder}".encode(), digest_size=12).hexdigest()
        held = (await self._peers.heads([(entry.id, file_id)])).get(entry.id, file_id)
        if held is not None and not held.deleted and held.rev == rev:
            return _info(held)
        chunks = await trio.to_thread.run_sync(self._chunks, file.name, content, limiter=self._embedding)
        vectors = b""
        for first in range(0, len(chunks), EMBED_BATCH):
            texts = [piece.text for piece in chunks[first : first + EMBED_BATCH]]
            rows = await trio.to_thread.run_sync(self._embedder.embed_passages, texts, limiter=self._embedding)
            vectors += search.to_wire(rows)
        head = self._head(file_id, name=file.name, size_bytes=file.size_bytes, rev=rev, chunks=len(chunks))
        spans = tuple((piece.start, piece.end, piece.text) for piece in chunks)
        await self._write(entry, Operation(head, b"", spans, vectors))
        await self._undo_if_deleted(entry, file_id)
        return _info(head)

    def _chunks(self, name: str, content: bytes) -> list[chunk.Chunk]:
        return chunk.split(parse.text_of(name, content), self._embedder.count_tokens)

    async def _undo_if_deleted(self, entry: StoreEntry, file_id: str) -> None:
        """Takes back what was attached while the file was being deleted elsewhere: the delete did not see it."""
        head = (await self._peers.heads([(FILES.id, file_id)])).get(FILES.id, file_id)
        if head is not None and head.deleted:
            await self._bury(entry, file_id)
            raise _unknown_file(file_id)

    async def detach(self, store: str, file_id: str) -> None:
        """Raises BadRequest (404) when the store is unknown or does not hold the file, Refused without a quorum."""
        await self._open.wait()
        entry = self._local.registry.find(store)
        heads = await self._peers.heads([(entry.id, file_id)])
        head = heads.get(entry.id, file_id)
        if (head is None and heads.certain) or (head is not None and head.deleted):
            raise _unknown_file(file_id)
        await self._bury(entry, file_id)

    async def store_files(self, store: str) -> list[FileInfo]:
        """Raises BadRequest (404) when unknown, Refused when part of the store does not answer."""
        await self._open.wait()
        return await self._list(self._local.registry.find(store))

    async def _list(self, entry: StoreEntry) -> list[FileInfo]:
        await self._open.wait()

        async def ask(node: NodeId, shards: list[int], stale_too: bool) -> ShardReply[list[DocumentHead]]:
            if node == self._me:
                shards = self._fit(entry, shards, stale_too)
                replica = self._local.replica(entry.id)
                return ShardReply([] if replica is None else replica.documents(shards), shards)
            header, tail = await self._peers.ask(node, "documents.files", wire.FilesCall(entry, shards, stale_too))
            heads = [head for head in wire.decoded(wire.HEADS, tail) if head is not None]
            return ShardReply(heads, wire.call_of(wire.ShardsReply, header).shards)

        parts, answered = await self._peers.read(entry, ask)
        if answered < SHARDS:
            raise Refused(f"only {answered} of {SHARDS} shards answer, the list would be partial", 2.0)
        heads = [head for part in parts for head in part.answer if not head.deleted]
        return [_info(head) for head in sorted(heads, key=lambda head: (head.created_at, head.doc_id))]

    # -- search

    async def search(
        self, store: str, query: str, top_k: int, *, embedding_weight: float = 1.0, text_weight: float = 1.0
    ) -> SearchResult:
        """The best passages, the same from every node.

        Raises:
            BadRequest: store unknown (404), or a parameter out of range.
        """
        await self._open.wait()
        entry = self._local.registry.find(store)
        _check_search(query, top_k, embedding_weight, text_weight)
        raw = b""
        if embedding_weight > 0:
            self._check_embedder(entry)
            raw = search.to_wire(await trio.to_thread.run_sync(self._embedder.embed, [query], limiter=self._querying))
        text, depth = (query if text_weight > 0 else ""), search.depth_for(top_k)

        async def ask(node: NodeId, shards: list[int], stale_too: bool) -> ShardReply[ShardResult]:
            if node == self._me:
                shards = self._fit(entry, shards, stale_too)
                vector = self._local.query_vector(raw)
                return ShardReply(await self._local.search(entry.id, shards, vector, text, depth), shards)
            call = wire.SearchCall(entry, shards, stale_too, depth, text)
            header, tail = await self._peers.ask(node, "documents.search", call, raw)
            return ShardReply(wire.decoded(wire.ANSWER, tail), wire.call_of(wire.ShardsReply, header).shards)

        parts, answered = await self._peers.read(entry, ask)
        answers = [part.answer for part in parts]
        ranked = search.fuse(answers, top_k, embedding_weight=embedding_weight, text_weight=text_weight)
        contents = {stats.shard: (stats.entries, stats.total) for answer in answers for stats in answer.stats}
        self._searches += 1
        self._partial += answered < SHARDS
        passages = tuple(_passage(item) for item in ranked)
        return SearchResult(entry.name, passages, search.contents_digest(contents), answered, SHARDS)

    def _fit(self, entry: StoreEntry, shards: Iterable[int], stale_too: bool) -> list[int]:
        return [shard for shard in shards if stale_too or not self._peers.is_behind(entry.id, shard)]

    # -- common

    def _check_embedder(self, entry: StoreEntry) -> None:
        if entry.embedder != self._embedder.identity:
            raise BadRequest(
                f"store {entry.name!r} holds vectors of {entry.embedder}, this node makes {self._embedder.identity}; "
                "make a new store",
                "store",
                "embedder_mismatch",
                409,
            )

    def _head(self, doc_id: str, **fields: Any) -> DocumentHead:
        now_s = self._now()
        stamp = self._local.clock.next(now_s)
        return DocumentHead(doc_id, stamp.hlc, stamp.node, created_at=int(now_s), **fields)

    async def _write(self, entry: StoreEntry, operation: Operation) -> None:
        self._writes += 1
        try:
            await self._peers.write(entry, operation)
        except Refused:
            self._refused += 1
            raise

    def statistics(self) -> DocumentStatistics:
        summary, counts = self._local.summary(), self._repair.counts
        return DocumentStatistics(
            **held_counts(summary, len(self._local.registry.live())),
            searches_total=self._searches,
            partial_searches_total=self._partial,
            writes_total=self._writes,
            writes_refused_total=self._refused,
            rejected_operations_total=self._answers.rejected,
            repair_rounds_total=counts.rounds,
            repair_pulled_total=counts.pulled,
            repair_pushed_total=counts.pushed,
            repair_failed_total=counts.failed,
            dropped_shards_total=counts.dropped_shards,
            peer_calls_failed_total=self._peers.calls_failed,
            malformed_gossip_total=self._peers.malformed,
            damaged_files=len(self._local.damaged),
        )


def _check_search(query: str, top_k: int, embedding_weight: float, text_weight: float) -> None:
    if not query.strip() or len(query) > MAX_QUERY_CHARS:
        raise BadRequest(f"expected a query of 1 to {MAX_QUERY_CHARS} characters", "query")
    if not 1 <= top_k <= MAX_TOP_K:
        raise BadRequest(f"expected 1 to {MAX_TOP_K} results, got {top_k}", "max_num_results")
    if not (0 <= embedding_weight < 1e6 and 0 <= text_weight < 1e6 and embedding_weight + text_weight > 0):
        raise BadRequest("expected two weights of 0 or more, one of them above 0", "ranking_options")


def _info(head: DocumentHead) -> FileInfo:
    return FileInfo(head.doc_id, head.name, head.size_bytes, head.created_at, head.rev, head.chunks)


def _passage(item: search.Ranked) -> Passage:
    piece = item.candidate
    return Passage(piece.doc_id, piece.name, piece.text, piece.start, piece.end, item.score)


def _unknown_file(file_id: str) -> BadRequest:
    return BadRequest(f"no file {file_id!r} here", "file_id", "not_found", 404)
