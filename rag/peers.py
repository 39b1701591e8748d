"""How a node writes to the owners of a shard and reads from few of them.

Writes go to all live owners in parallel and stand once `WRITE_QUORUM` nodes have them on disk (all of them, where
fewer live). When owners are gone, the next nodes in rendezvous order hold the write for them: a hint is a copy
kept by a node that does not own it, as durable as any other, and repair moves it home. Reads name one node for
each shard, this one first, and move on to the next candidate for whatever was not answered, or was answered by a
node that reports itself to be behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
import trio

from mesh.errors import PeerLost, Refused, RemoteError
from mesh.ids import NodeId
from mesh.view import PeerState, View
from mesh.wire.calls import CALL_FAILURES, Call, CallReply
from rag import place, wire
from rag.local import LocalStores
from rag.reading import A, Ask, HeadsFound, ShardReply
from rag.registry import StoreEntry
from rag.replica import SHARDS, DocumentHead, ShardDigest, shard_of
from rag.store import StoreCorrupt
from rag.wire import Operation, Summary

COPY_FAILURES = (*CALL_FAILURES, StoreCorrupt)  # a copy, here or elsewhere, that cannot be written or read: others can
WRITE_DEADLINE_S = 10.0  # for membership to notice a dead owner, and then some
READ_GRACE_S = 0.2
WRITE_GRACE_S = 0.5  # that a write which stands waits for the remaining owners, so that they need no repair
ASK_TIMEOUT_S = 2.0
RETRY_S = 0.25


class Peers:
    def __init__(self, me: NodeId, local: LocalStores, view: Callable[[], View], call: Call, now: Callable[[], float]) -> None:
        self.me = me
        self._local = local
        self._view = view
        self._call = call
        self._now = now
        self._dead_since: dict[NodeId, float] = {}
        self._roster: list[NodeId] = []  # of the last view that was not frozen
        self._known: dict[NodeId, tuple[object, Summary]] = {}  # by peer: what it gossiped, decoded
        self._full: dict[NodeId, Summary] = {}  # by peer: asked for, as its gossip was too large
        self.doubted: set[tuple[NodeId, str, int]] = set()  # copies that missed a write of ours
        self.malformed = 0
        self.calls_failed = 0

    # -- members

    def live(self) -> list[NodeId]:
        """Live nodes, this one always among them."""
        return sorted({self.me, *(peer.id for peer in self._view().live())})

    def others(self) -> list[NodeId]:
        return [node for node in self.live() if node != self.me]

    def roster(self) -> list[NodeId]:
        """The nodes that may own shards. While the view is frozen, those before: no copies for a node that is only cut off."""
        view, now_s = self._view(), self._now()
        for peer in view.peers.values():
            if peer.state is PeerState.DEAD:
                self._dead_since.setdefault(peer.id, now_s)
            else:
                self._dead_since.pop(peer.id, None)
        if not view.frozen or not self._roster:
            self._roster = sorted({self.me, *place.roster(view, self._dead_since, now_s)})
        left = {peer.id for peer in view.peers.values() if peer.state is PeerState.LEFT}
        return [node for node in self._roster if node not in left]

    def owners(self, store: str, shard: int) -> list[NodeId]:
        return place.owners(store, shard, self.roster())

    async def ask(
        self, node: NodeId, kind: str, call: msgspec.Struct, tail: bytes = b"", timeout_s: float = ASK_TIMEOUT_S
    ) -> CallReply:
        """One call to a peer.

        Raises:
            PeerLost, DeadlineExceeded, Refused, BadRequest, RemoteError
        """
        peer = self._view().peers.get(node)
        if peer is None:
            raise PeerLost(node, "no longer in the view")
        try:
            return await self._call(peer.address, kind, wire.header_of(call), tail, timeout_s=timeout_s)
        except CALL_FAILURES:
            self.calls_failed += 1
            raise

    # -- what peers have published

    def summary(self, node: NodeId) -> Summary:
        """What a peer has gossiped of its stores; empty if nothing, or nothing that can be read."""
        peer = self._view().peers.get(node)
        if peer is None:
            return Summary()
        known = self._known.get(node)
        if known is None or known[0] is not peer.facts.documents:
            try:
                summary = msgspec.convert(peer.facts.documents, Summary)
            except msgspec.ValidationError:
                self.malformed += 1
                summary = Summary()
            known = self._known[node] = (peer.facts.documents, summary)
        return self._full.get(node, known[1]) if known[1].brief else known[1]

    def brief_of(self, node: NodeId) -> str:
        """Names a summary too large for gossip; empty if what was gossiped is whole."""
        self.summary(node)
        return self._known[node][1].brief if node in self._known else ""

    def remember(self, node: NodeId, summary: Summary) -> None:
        """Keeps a summary that was asked for."""
        self._full[node] = summary

    def forget_absent(self) -> None:
        """Keeps no record of nodes that the view no longer has."""
        known = self._view().peers
        for table in (self._known, self._full, self._dead_since):
            for node in [node for node in table if node not in known]:
                table.pop(node)
        self.doubted = {copy for copy in self.doubted if copy[0] in known}

    def digest_here(self, store: str, shard: int) -> ShardDigest:
        replica = self._local.replica(store)
        return ShardDigest() if replica is None else replica.digest(shard)

    def digest_at(self, node: NodeId, store: str, shard: int) -> ShardDigest:
        return self.digest_here(store, shard) if node == self.me else self.summary(node).digest(store, shard)

    def is_behind(self, store: str, shard: int) -> bool:
        """Whether some live peer has published a newer entry than any held here: writes come directly, gossip later."""
        newest = self.digest_here(store, shard).newest
        return any(self.summary(node).digest(store, shard).newest > newest for node in self.others())

    # -- writes

    async def write(self, entry: StoreEntry, operation: Operation) -> int:
        """Puts one operation on the disks of its owners; returns how many nodes hold it.

        Raises:
            Refused: fewer than the quorum could be reached in time. The write may yet appear: doing it again is safe.
        """
        shard = shard_of(operation.head.doc_id)
        tail = wire.ENCODER.encode([operation])
        held: set[NodeId] = set()
        failed: dict[NodeId, str] = {}
        with trio.move_on_after(WRITE_DEADLINE_S):
            while True:
                live = self.live()
                needed = min(place.WRITE_QUORUM, len(live))
                ranked = [node for node in place.ranking(entry.id, shard, self.roster()) if node in live]
                owners = [node for node in self.owners(entry.id, shard) if node in live]
                targets = [node for node in owners if node not in held]
                spare = [node for node in ranked if node not in owners and node not in held]
                sound = len(held) + sum(node not in failed for node in targets)
                targets += spare[: max(0, needed - sound)]
                await self._send(entry, operation, tail, targets, needed, held, failed)
                if len(held) >= needed:
                    self.doubted.update((node, entry.id, shard) for node in self.owners(entry.id, shard) if node not in held)
                    return len(held)
                await trio.sleep(RETRY_S)
        reasons = "; ".join(sorted(set(failed.values()))) or "no owner answered"
        raise Refused(f"stored on {len(held)} nodes, {needed} are needed: {reasons}", 2.0)

    async def _send(
        self,
        entry: StoreEntry,
        operation: Operation,
        tail: bytes,
        targets: Sequence[NodeId],
        needed: int,
        held: set[NodeId],
        failed: dict[NodeId, str],
    ) -> None:
        """One parallel attempt; fills `held` and `failed`. Ends early, a moment after enough nodes hold it."""
        progress = trio.Event()
        waiting = len(targets)

        async def put(node: NodeId) -> None:
            nonlocal progress, waiting
            try:
                if node == self.me:
                    applied = await self._local.apply(entry, [operation])
                    accepted, reason = applied.accepted, "; ".join(applied.rejected)
                else:
                    header, _ = await self.ask(node, "documents.apply", wire.ApplyCall(entry), tail, WRITE_DEADLINE_S)
                    accepted, reason = wire.count_in(header, "accepted"), str(header.get("reason", ""))
                if accepted:
                    held.add(node)
                    failed.pop(node, None)
                else:
                    failed[node] = reason
            except COPY_FAILURES as error:
                failed[node] = str(error)
            waiting -= 1
            progress.set()
            progress = trio.Event()

        async with trio.open_nursery() as nursery:
            for node in targets:
                nursery.start_soon(put, node)
            while waiting and len(held) < needed:
                await progress.wait()
            with trio.move_on_after(WRITE_GRACE_S):
                while waiting:
                    await progress.wait()
            nursery.cancel_scope.cancel()

    async def register(self, entry: StoreEntry) -> None:
        """Makes a registry entry known to every live node.

        Raises:
            Refused: not even the quorum could be reached.
        """
        held = {self.me}
        await self._local.register([entry])

        async def tell(node: NodeId) -> None:
            try:
                await self.ask(node, "documents.register", wire.RegisterCall([entry]))
                held.add(node)
            except CALL_FAILURES:
                pass  # counted by `ask`; gossip brings it too

        with trio.move_on_after(WRITE_DEADLINE_S):
            while True:
                async with trio.open_nursery() as nursery:
                    for node in self.others():
                        if node not in held:
                            nursery.start_soon(tell, node)
                if len(held) >= min(place.WRITE_QUORUM, len(self.live())):
                    return
                await trio.sleep(RETRY_S)
        raise Refused("the store is known to this node only; gossip will spread it", 2.0)

    # -- reads

    def live_owners(self, store: str, shard: int) -> list[NodeId]:
        """The owners to ask for a shard, best first; copies that missed a write of ours last."""
        live = set(self.live())
        owners = [node for node in self.owners(store, shard) if node in live]
        return sorted(owners, key=lambda node: (node, store, shard) in self.doubted)

    def holders(self, store: str, shard: int) -> list[NodeId]:
        """Live owners and other nodes that announced entries: hints, and what has not moved yet. Those with the newest first."""
        owners = self.live_owners(store, shard)
        others = [node for node in self.live() if node not in owners and self.digest_at(node, store, shard).entries]

        def fullness(node: NodeId) -> tuple[int, int]:
            digest = self.digest_at(node, store, shard)
            return -digest.newest, -digest.entries

        return sorted(owners + others, key=fullness)

    async def read(self, entry: StoreEntry, ask: Ask[A]) -> tuple[list[ShardReply[A]], int]:
        """Answers for the shards of a store from few nodes, no shard twice, and how many shards were answered.

        Owners that are not behind come first: others may hold a few entries that they keep for an owner, and no more.
        Where no such owner answers, the fullest copy is taken at its word.
        """
        left, lost = set(range(SHARDS)), set[NodeId]()
        parts: list[ShardReply[A]] = []

        async def put(node: NodeId, shards: list[int], stale_too: bool) -> None:
            try:
                part = await ask(node, shards, stale_too)
            except COPY_FAILURES:
                lost.add(node)
                return
            part.shards = [shard for shard in part.shards if shard in shards]
            left.difference_update(part.shards)
            parts.append(part)

        for stale_too in (False, True):
            tried: dict[int, set[NodeId]] = {shard: set() for shard in left}
            while left:
                choices = self.holders if stale_too else self.live_owners
                candidates = {
                    shard: [node for node in choices(entry.id, shard) if node not in lost and node not in tried[shard]]
                    for shard in left
                }
                if stale_too:
                    candidates = {shard: nodes[:1] for shard, nodes in candidates.items()}
                plan = place.cover(candidates, self.me)
                if not plan:
                    break
                for node, shards in plan.items():
                    for shard in shards:
                        tried[shard].add(node)
                async with trio.open_nursery() as nursery:
                    for node, shards in plan.items():
                        nursery.start_soon(put, node, shards, stale_too)
        return parts, SHARDS - len(left)

    async def heads(self, items: Sequence[tuple[str, str]]) -> HeadsFound:
        """The latest head of each (store id, document id) that any live copy has.

        All live owners are asked, not one: with writes on two of three, the greatest stamp of any two is the last write
        that stood. Once that many have answered, the others get a moment, so that a hanging node does not hold reads up.
        """
        wanted: dict[NodeId, list[tuple[str, str]]] = {}
        owners = {item: set(self.owners(item[0], shard_of(item[1]))) for item in items}
        for item in owners:
            for node in self.holders(item[0], shard_of(item[1])):
                wanted.setdefault(node, []).append(item)
        found = HeadsFound({}, {item: set() for item in owners}, owners)
        progress, waiting = trio.Event(), len(wanted)

        async def look(node: NodeId, lines: list[tuple[str, str]]) -> None:
            nonlocal progress, waiting
            try:
                heads = self.heads_here(lines) if node == self.me else await self._heads_of(node, lines)
                for line, head in zip(lines, heads):
                    found.take(node, line, head)
            except CALL_FAILURES:
                pass  # counted by `ask`; `found` records which owners did not answer
            waiting -= 1
            progress.set()
            progress = trio.Event()

        async with trio.open_nursery() as nursery:
            for node, lines in wanted.items():
                nursery.start_soon(look, node, lines)
            while waiting and not found.certain:
                await progress.wait()
            with trio.move_on_after(READ_GRACE_S):
                while waiting:
                    await progress.wait()
            nursery.cancel_scope.cancel()
        return found

    def heads_here(self, items: Iterable[tuple[str, str]]) -> list[DocumentHead | None]:
        replicas = ((self._local.replica(store), doc_id) for store, doc_id in items)
        return [None if replica is None else replica.get(doc_id) for replica, doc_id in replicas]

    async def _heads_of(self, node: NodeId, items: list[tuple[str, str]]) -> list[DocumentHead | None]:
        _, tail = await self.ask(node, "documents.heads", wire.HeadsCall(items))
        found = wire.decoded(wire.HEADS, tail)
        if len(found) != len(items):
            raise RemoteError(node, f"expected {len(items)} heads, got {len(found)}")
        return found

    async def operation(self, entry: StoreEntry, head: DocumentHead) -> Operation | None:
        """A whole document, as of this head or later, from any node that has it."""
        shard = shard_of(head.doc_id)
        ranked = sorted(self.holders(entry.id, shard), key=lambda node: node != self.me)
        for node in ranked:
            try:
                found = await self.fetch(node, entry, [head.doc_id])
            except COPY_FAILURES:
                continue
            if found and found[0].head.stamp >= head.stamp:
                return found[0]
        return None

    async def fetch(self, node: NodeId, entry: StoreEntry, doc_ids: list[str]) -> list[Operation]:
        """Documents of a node, in the order asked, as many as one answer holds.

        Raises: as `ask`.
        """
        if node == self.me:
            return await self._local.operations(entry.id, doc_ids, wire.BATCH_BYTES)
        _, tail = await self.ask(node, "documents.fetch", wire.FetchCall(entry, doc_ids), timeout_s=WRITE_DEADLINE_S)
        return wire.decoded(wire.OPERATIONS, tail)
