"""The shell of the entry's queue: tickets of requests that need a path, and the exchange of demand and grants with the stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Annotated, Protocol

import msgspec
import trio
from msgspec import Meta

from mesh.errors import PeerLost
from mesh.ids import Address, NodeId
from mesh.view import View
from mesh.wire.calls import Header, Post
from routing.admission import Queue
from routing.entry_queue import Demand, EntryQueue, QueueLane
from routing.fair_queue import Ticket


class RoomGranted(msgspec.Struct, frozen=True):
    """The frame `stage.room`: the sender reserves `count` places for requests of `model` from this entry."""

    model: str
    count: Annotated[int, Meta(ge=1, le=1_000_000)]


class Waiting(Protocol):
    """A request that waits for a path."""

    def place(self, ticket: Ticket, without: frozenset[NodeId]) -> tuple[NodeId, ...] | None:
        """As `routing.entry_queue.Place`."""


class PathQueue:
    """One for a node. Every call is answered by `Waiting.place` of the tickets whose turn it is, before it returns."""

    def __init__(self, address: Address, post: Post, view: Callable[[], View], now: Callable[[], float]) -> None:
        self._address = address
        self.receivers = {"stage.room": self._on_room}
        self._post = post
        self._view = view
        self._now = now
        self._core = EntryQueue(self._place)
        self._waiting: dict[int, Waiting] = {}
        self._last_number = 0
        self._woken = trio.Event()
        self._sleeps_until = math.inf

    async def run(self) -> None:
        """Sends the stages what waits for them, and drops what they granted in vain; until cancelled."""
        while True:
            self._sleeps_until = self._core.deadline
            with trio.move_on_at(self._sleeps_until):
                await self._woken.wait()
            self._woken = trio.Event()
            self._core.tick(self._now())
            for demand in self._core.due_demands(self._now()):
                self._send(demand)

    # --- what a request does

    def ticket(self, arrived_at: float, priority: int, tenant: str, cost: float, *, continued: bool) -> Ticket:
        self._last_number += 1
        return Ticket(self._last_number, arrived_at, priority, tenant, cost, continued)

    def join(self, waiting: Waiting, ticket: Ticket, lane: QueueLane) -> None:
        """Queues for a path, or again after an open that failed, in the same place."""
        self._waiting[ticket.number] = waiting
        self._core.join(ticket, lane, self._now())
        self._wake()

    def refused(self, ticket: Ticket, node: NodeId) -> None:
        """`node` refused the open for want of room; the request then joins again."""
        self._core.refused(ticket, node, self._now())
        self._wake()

    def node_full(self, node: NodeId, model: str) -> None:
        """`node` evicted a sequence of the model for lack of room: what queues next waits for its grants."""
        self._core.node_full(node, model, self._now())
        self._wake()

    def opened(self, ticket: Ticket) -> None:
        self._core.opened(ticket, self._now())
        self._forget(ticket)

    def leave(self, ticket: Ticket) -> None:
        """The request needs no path any more. Twice is fine."""
        self._core.leave(ticket, self._now())
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        self._waiting.pop(ticket.number, None)
        self._wake()

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._core

    # --- what the mesh does

    def node_gone(self, node: NodeId) -> None:
        """`node` died, left or restarted."""
        self._core.node_gone(node, self._now())
        self._wake()

    def view_changed(self) -> None:
        self._core.view_changed(self._now())
        self._wake()

    def _on_room(self, sender: NodeId, header: Header, tail: bytes) -> None:
        granted = msgspec.convert(header, RoomGranted)
        self._core.granted(sender, granted.model, granted.count, self._now())
        self._wake()

    # --- what it looks like

    def state(self, running: int, lane: QueueLane | None, priority: int) -> Queue:
        """As admission sees it. `lane` None: not known before the request is prepared."""
        now = self._now()
        expected_s = self._core.expected_wait_s(lane, priority, now) if lane is not None else 0.0
        return Queue(running, len(self._core), expected_s, self._core.start_rate(now))

    def __len__(self) -> int:
        """Tickets that wait for room."""
        return len(self._core)

    @property
    def full_nodes(self) -> Collection[NodeId]:
        return self._core.full_nodes()

    # --- the core's way out

    def _place(self, ticket: Ticket, without: frozenset[NodeId]) -> tuple[NodeId, ...] | None:
        return self._waiting[ticket.number].place(ticket, without)

    def _wake(self) -> None:
        if self._core.deadline < self._sleeps_until:
            self._woken.set()

    def _send(self, demand: Demand) -> None:
        peer = self._view().peers.get(demand.node)
        if peer is None:
            return
        now = self._now()
        heads = [(each.continued, each.priority, max(0.0, now - each.arrived_at)) for each in demand.heads]
        header: Header = {"model": demand.model, "address": self._address, "heads": heads, "received": demand.received_total}
        try:
            self._post(peer.address, "stage.demand", header)
        except PeerLost:
            pass  # the link's loss is reported to this entry, and the demand is sent again
