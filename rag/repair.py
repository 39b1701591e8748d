"""Background repair: makes every owner of a shard hold the same, and takes copies home that others kept for it.

Each round compares this node's digests with those that live peers have gossiped. Where they differ the peer is asked
for its present summary, as gossip is old; where they still differ, for a listing; then what is newer there is
pulled, oldest first, and what is newer here is pushed if the peer owns the shard. Any two nodes may do this at the
same time, in any order: merging makes it harmless. A node that holds entries of a shard which it does not own drops them
once all owners live and list every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog
import trio

from mesh.ids import NodeId
from mesh.wire.calls import CALL_FAILURES
from rag import place, wire
from rag.local import LocalStores
from rag.peers import Peers
from rag.registry import FILES, StoreEntry
from rag.replica import SHARDS, ListingEntry, Replica
from rag.wire import Operation, Summary

log = structlog.get_logger()

ROUND_S = 1.0


@dataclass(slots=True)
class RepairCounts:
    rounds: int = 0
    pulled: int = 0
    pushed: int = 0
    dropped_shards: int = 0
    failed: int = 0


class Repair:
    def __init__(self, me: NodeId, local: LocalStores, peers: Peers) -> None:
        self.counts = RepairCounts()
        self._me = me
        self._local = local
        self._peers = peers

    async def run(self) -> None:
        while True:
            await self.round()
            await trio.sleep(ROUND_S)

    async def round(self) -> None:
        """One comparison with every live peer, in parallel over peers."""
        self.counts.rounds += 1
        self._peers.forget_absent()
        async with trio.open_nursery() as nursery:
            for node in self._peers.others():
                nursery.start_soon(self._guarded, node)
        await self._drop_foreign()

    async def _guarded(self, node: NodeId) -> None:
        try:
            await self.compare(node)
        except CALL_FAILURES as error:
            self.counts.failed += 1
            log.info("documents_repair_failed", peer=node, reason=str(error))
        except Exception:  # supervised: one peer's repair must not end the node's documents; the next round tries again
            self.counts.failed += 1
            log.exception("documents_repair_broke", peer=node)

    async def compare(self, node: NodeId) -> None:
        """Makes this node and one peer agree on what either of them owns.

        Raises: as a call to the peer.
        """
        summary = self._peers.summary(node)
        await self._local.register(summary.stores)
        brief = self._peers.brief_of(node)
        if not brief and not self._differing(node, summary):
            return
        _, tail = await self._peers.ask(node, "documents.summary", wire.SummaryCall())
        present = wire.decoded(wire.SUMMARY, tail)
        if brief:
            self._peers.remember(node, present)
        await self._local.register(present.stores)
        for entry, shard in self._differing(node, present):
            await self._reconcile(node, entry, shard)

    def _differing(self, node: NodeId, summary: Summary) -> list[tuple[StoreEntry, int]]:
        """The shards that one of the two owns and in which they differ."""
        found = []
        for entry in (FILES, *self._local.registry.live()):
            for shard in range(SHARDS):
                here, there = self._peers.digest_here(entry.id, shard), summary.digest(entry.id, shard)
                if here.agrees(there):
                    self._peers.doubted.discard((node, entry.id, shard))
                    continue
                owners = self._peers.owners(entry.id, shard)
                if (self._me in owners and there.entries) or (node in owners and here.entries):
                    found.append((entry, shard))
        return found

    async def _reconcile(self, node: NodeId, entry: StoreEntry, shard: int) -> None:
        theirs = await self._listing(node, entry, shard)
        owners = self._peers.owners(entry.id, shard)
        if self._me in owners:
            replica = self._local.replica(entry.id) or Replica()
            await self._pull(node, entry, replica.wanted(shard, theirs))
        held = self._local.replica(entry.id)
        if node in owners and held is not None:
            await self._push(node, entry, held.surplus(shard, theirs))
        self._peers.doubted.discard((node, entry.id, shard))

    async def _pull(self, node: NodeId, entry: StoreEntry, doc_ids: list[str]) -> None:
        while doc_ids:
            operations = await self._peers.fetch(node, entry, doc_ids[: wire.MAX_FETCHED])
            if not operations:
                return  # gone since the listing: the next round sees
            applied = await self._local.apply(entry, operations)
            self.counts.pulled += applied.changed
            doc_ids = _after(doc_ids, operations)

    async def _push(self, node: NodeId, entry: StoreEntry, doc_ids: list[str]) -> None:
        while doc_ids:
            operations = await self._local.operations(entry.id, doc_ids[: wire.MAX_FETCHED], wire.BATCH_BYTES)
            if not operations:
                return
            tail = wire.ENCODER.encode(operations)
            header, _ = await self._peers.ask(node, "documents.apply", wire.ApplyCall(entry), tail, timeout_s=10.0)
            self.counts.pushed += wire.count_in(header, "changed")
            doc_ids = _after(doc_ids, operations)

    async def _drop_foreign(self) -> None:
        """Lets go of shards that this node does not own, once every owner is live and holds all that is held here."""
        for entry in (FILES, *self._local.registry.live()):
            replica = self._local.replica(entry.id)
            for shard in replica.digests() if replica is not None else ():
                before = self._peers.digest_here(entry.id, shard)
                if not await self._is_safe_elsewhere(entry, shard):
                    continue
                # Only if nothing came while the owners were asked.
                dropped = await self._local.forget(entry.id, shard, before)
                self.counts.dropped_shards += dropped

    async def _is_safe_elsewhere(self, entry: StoreEntry, shard: int) -> bool:
        owners, live = self._peers.owners(entry.id, shard), set(self._peers.live())
        if self._me in owners or len(owners) < place.REPLICAS or not live.issuperset(owners):
            return False
        for owner in owners:
            try:
                theirs = await self._listing(owner, entry, shard)
            except CALL_FAILURES:
                return False
            replica = self._local.replica(entry.id)
            if replica is None or replica.surplus(shard, theirs):
                return False
        return True

    async def _listing(self, node: NodeId, entry: StoreEntry, shard: int) -> list[ListingEntry]:
        _, tail = await self._peers.ask(node, "documents.listing", wire.ListingCall(entry, shard), timeout_s=10.0)
        return wire.decoded(wire.LISTING, tail)


def _after(doc_ids: list[str], operations: list[Operation]) -> list[str]:
    """What is left to ask for after an answer in the order asked: all behind the last document that came."""
    last = operations[-1].head.doc_id
    return doc_ids[doc_ids.index(last) + 1 :] if last in doc_ids else []
