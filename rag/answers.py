"""The calls of other nodes' document services, answered from what this node holds."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.ids import NodeId
from mesh.wire.calls import CallReply, Handler, Header
from rag import wire
from rag.local import LocalStores
from rag.peers import Peers
from rag.registry import StoreEntry
from rag.replica import ListingEntry

MAX_DEPTH = 1000


class Answers:
    def __init__(self, local: LocalStores, peers: Peers) -> None:
        self._local = local
        self._peers = peers
        self.rejected = 0

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {
            "documents.apply": self._apply,
            "documents.register": self._register,
            "documents.summary": self._summary,
            "documents.listing": self._listing,
            "documents.fetch": self._fetch,
            "documents.heads": self._heads,
            "documents.files": self._files,
            "documents.search": self._search,
        }

    async def _apply(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        call = wire.call_of(wire.ApplyCall, header)
        operations = wire.decoded(wire.OPERATIONS, tail)
        applied = await self._local.apply(call.entry, operations)
        self.rejected += len(applied.rejected)
        reason = "; ".join(sorted(set(applied.rejected)))
        return {"accepted": applied.accepted, "changed": applied.changed, "reason": reason}, b""

    async def _register(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        await self._local.register(wire.call_of(wire.RegisterCall, header).entries)
        return {}, b""

    async def _summary(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        return {}, wire.ENCODER.encode(self._local.summary())

    async def _listing(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        call = wire.call_of(wire.ListingCall, header)
        wire.check_shards([call.shard])
        replica = self._local.replica(call.entry.id)
        lines: list[ListingEntry] = [] if replica is None else replica.listing(call.shard)
        return {}, wire.ENCODER.encode(lines)

    async def _fetch(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        call = wire.call_of(wire.FetchCall, header)
        operations = await self._local.operations(call.entry.id, call.docs[: wire.MAX_FETCHED], wire.BATCH_BYTES)
        return {}, wire.ENCODER.encode(operations)

    async def _heads(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        return {}, wire.ENCODER.encode(self._peers.heads_here(wire.call_of(wire.HeadsCall, header).items))

    async def _files(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        call = wire.call_of(wire.FilesCall, header)
        shards = await self._fit(call.entry, call.shards, call.stale_too)
        replica = self._local.replica(call.entry.id)
        heads = [] if replica is None else replica.documents(shards)
        return wire.header_of(wire.ShardsReply(shards)), wire.ENCODER.encode(heads)

    async def _search(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        call = wire.call_of(wire.SearchCall, header)
        query = self._local.query_vector(tail)
        shards = await self._fit(call.entry, call.shards, call.stale_too)
        answer = await self._local.search(call.entry.id, shards, query, call.terms_of, min(call.depth, MAX_DEPTH))
        return wire.header_of(wire.ShardsReply(shards)), wire.ENCODER.encode(answer)

    async def _fit(self, entry: StoreEntry, shards: list[int], stale_too: bool) -> list[int]:
        """The shards that this node may answer for: not those it is behind in, unless asked to."""
        await self._local.register([entry])
        return [shard for shard in wire.check_shards(shards) if stale_too or not self._peers.is_behind(entry.id, shard)]
