"""A few document services in one process: peers' calls and gossip are carried by hand, nodes die and links are cut.

Headers and tails cross as bytes, errors as the links carry them, so nothing is shared that a network would not share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from mesh.errors import DeadlineExceeded, MeshError, PeerLost
from mesh.ids import Address, NodeId
from mesh.links.call_errors import error_from_header, error_to_header
from mesh.view import Facts, Peer, PeerState, View
from mesh.wire.calls import CallReply, Header
from rag.embed import Embedder
from rag.service import Documents
from tests.rag.fakes import HashingEmbedder

UNIX_S = 1_800_000_000.0


class Site:
    """One machine: its directory outlives its process."""

    def __init__(self, mesh: SmallMesh, number: int, embedder: Embedder) -> None:
        self.id = NodeId(f"{number:016x}")
        self.address = ("127.0.0.1", 10_000 + number)
        self.mesh = mesh
        self.embedder = embedder
        self.directory = mesh.directory / self.id
        self.facts = Facts()
        self.up = False
        self.clock_error_s = 0.0
        self.documents: Documents | None = None
        self.scope: trio.CancelScope | None = None
        self.done = trio.Event()

    def view(self) -> View:
        peers = {}
        for site in self.mesh.sites:
            seen = site.id == self.id or (site.up and self.mesh.linked(self, site)) or self.mesh.unnoticed
            state = PeerState.ALIVE if seen else PeerState.DEAD
            if site.documents is not None:
                peers[site.id] = Peer(site.id, site.id, site.address, state=state, facts=site.facts)
        return View(self.id, peers)

    def publish(self, record: dict[str, Any]) -> None:
        self.facts = Facts(documents=msgspec.msgpack.decode(msgspec.msgpack.encode(record)))

    def now(self) -> float:
        return UNIX_S + trio.current_time() + self.clock_error_s

    async def call(self, to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0) -> CallReply:
        site = next(site for site in self.mesh.sites if site.address == to)
        assert site is not self, "a node does not call itself"
        await trio.lowlevel.checkpoint()
        self.mesh.calls.append((self.id, site.id, kind))
        if site.id in self.mesh.hanging:
            await trio.sleep(timeout_s)
            raise DeadlineExceeded(kind)
        if not site.up or not self.mesh.linked(self, site):
            raise PeerLost(site.id, "connection refused")
        assert site.documents is not None
        try:
            answer, data = await site.documents.handlers[kind](
                self.id, msgspec.msgpack.decode(msgspec.msgpack.encode(header)), tail
            )
        except MeshError as error:
            raise error_from_header(site.id, error_to_header(error)) from None
        if not site.up or not self.mesh.linked(self, site):
            raise PeerLost(site.id, "reset")
        return msgspec.msgpack.decode(msgspec.msgpack.encode(answer)), bytes(data)


class SmallMesh:
    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.nursery = nursery
        self.sites: list[Site] = []
        self.calls: list[tuple[NodeId, NodeId, str]] = []
        self.sides: list[set[NodeId]] = []  # of a partition; empty: all are linked
        self.hanging: set[NodeId] = set()
        self.unnoticed = False  # the dead still look alive to everyone

    def __iter__(self) -> Iterator[Documents]:
        return (site.documents for site in self.sites if site.up and site.documents is not None)

    def __getitem__(self, number: int) -> Documents:
        documents = self.sites[number].documents
        assert documents is not None
        return documents

    def linked(self, one: Site, other: Site) -> bool:
        return not self.sides or any(one.id in side and other.id in side for side in self.sides)

    async def start(self, number: int) -> None:
        site = self.sites[number]
        site.documents = Documents(site.id, site.directory, site.embedder, site.view, site.call, site.publish, site.now)
        site.done = trio.Event()
        await self.nursery.start(self._live, site)
        site.up = True

    async def _live(self, site: Site, *, task_status: trio.TaskStatus[None]) -> None:
        assert site.documents is not None
        with trio.CancelScope() as site.scope:
            await site.documents.run(task_status=task_status)
        site.up = False
        site.done.set()

    async def kill(self, number: int) -> None:
        """The process ends; its disk stays. Nothing is sent: peers see a refused connection."""
        site = self.sites[number]
        site.up = False
        assert site.scope is not None
        site.scope.cancel()
        await site.done.wait()

    def split(self, *sides: Iterable[int]) -> None:
        self.sides = [{self.sites[number].id for number in side} for side in sides]

    def heal(self) -> None:
        self.sides = []

    def digests(self, store: str) -> list[dict[int, Any]]:
        """Each live node's digests of a store, as (entries, total) by shard."""
        found = []
        for documents in self:
            replica = documents._local.replica(store)
            held = {} if replica is None else replica.digests()
            found.append({shard: (digest.entries, digest.total) for shard, digest in held.items()})
        return found

    async def agree(self, store: str, within_s: float = 10.0) -> None:
        """Waits until every live node holds the same (meshes of three: all own all)."""

        def same() -> bool:
            return all(digests == self.digests(store)[0] for digests in self.digests(store))

        await self.until(same, "every node holds the same", within_s)

    async def until(self, condition: Callable[[], object], what: str, within_s: float = 10.0) -> None:
        """Looks every 0.1 s. A jumping clock does not wait for the threads that write files: ask for the outcome."""
        with trio.move_on_after(within_s) as scope:
            while not condition():
                await trio.sleep(0.1)
        assert not scope.cancelled_caught, f"not within {within_s:g} s: {what}"


@asynccontextmanager
async def small_mesh(directory: Path, nodes: int, embedder: Embedder | None = None) -> Any:
    async with trio.open_nursery() as nursery:
        mesh = SmallMesh(directory, nursery)
        for number in range(nodes):
            mesh.sites.append(Site(mesh, number, embedder or HashingEmbedder()))
        for number in range(nodes):
            await mesh.start(number)
        yield mesh
        nursery.cancel_scope.cancel()
