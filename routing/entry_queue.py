"""The waiting requests of one entry: in order, without polling, as the stages grant room.

A request that needs a path takes a ticket and joins the lane of its model and weights. Each lane is served in the order of
`routing.fair_queue`; a request is placed when a path is found without the *full* nodes. A node becomes full for a model when it
refuses an open, and from then on takes as many requests from here as it grants (`routing.room_grants`). It counts as free again
once nothing waits for it.

At most `OPENS_AT_ONCE` opens to one node are unanswered: a burst that finds all nodes idle is not sent out as a whole before
the first refusal can come back. After two refusals a request waits until something changes: more attempts gain little and load a
full mesh (power of two choices). Two things are tried again by time alone. A full node that granted nothing for `PROBE_S` is
sent one request, since it may have restarted, or run a release that grants nothing. And a lane that has waited for `WIDEN_S`
tries nodes that are not known to be full, if there are any.

This is a core: it does no I/O; `place` plans a path, and `due_demands` returns what to send to the stages.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.ids import NodeId
from routing.fair_queue import FairQueue, Ticket
from routing.room_grants import MAX_HEADS

OPENS_AT_ONCE = 32
MAX_REROUTES = 2  # refusals that are answered by another path at once
WIDEN_S = 1.0
PROBE_S = 5.0
RENEW_S = 1.0  # demand is sent again after so long: a message that was lost costs no more
CREDIT_S = 1.5  # a grant is used by then or not at all; less than the stage reserves the place for (`GRANT_S`)
SEND_S = 0.02  # between two demands to one stage: what changes meanwhile goes with the next
RATE_WINDOW_S, MIN_RATE_WINDOW_S = 10.0, 4.0  # over which the rate of starts is averaged; less soon after a time without any

QueueLane = tuple[str, ...]  # model id, then what else keeps requests from sharing a queue

Place = Callable[[Ticket, frozenset[NodeId]], tuple[NodeId, ...] | None]
"""Finds a path for a ticket without these nodes, and begins to open it: its nodes. Empty: the ticket needs none any more.
None: there is none without these nodes, or not now: the ticket waits. It must not call the queue back."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one stage is to be sent: the first tickets that wait for it."""

    node: NodeId
    model: str
    heads: tuple[Ticket, ...]
    received_total: int  # grants received from it


@dataclass(slots=True)
class _FullNode:
    """A node that refused a request of a model, and grants room for it since."""

    probe_at: float
    send_at: float  # when demand is due
    credits: deque[float] = field(default_factory=deque)  # when each ends
    received_total: int = 0
    sent_at: float = -math.inf

    def changed(self) -> None:
        """Has demand sent soon: not before `SEND_S` after the last."""
        self.send_at = min(self.send_at, self.sent_at + SEND_S)


@dataclass(slots=True)
class _Lane:
    queue: FairQueue = field(default_factory=FairQueue)
    tickets: int = 0  # in the queue, or with a path that is being opened
    blocked: bool = False  # its first ticket found no path; it is tried again when something changes
    widen_at: float = math.inf  # when a blocked lane may try nodes that are not known to be full


@dataclass(slots=True)
class _Opening:
    lane: QueueLane
    nodes: tuple[NodeId, ...]


class EntryQueue:
    """All tickets of one entry, from `join` until `opened` or `leave`."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lanes: dict[QueueLane, _Lane] = {}
        self._lane_of: dict[int, QueueLane] = {}
        self._opening: dict[int, _Opening] = {}
        self._refused_by: dict[int, set[NodeId]] = {}  # since the ticket last waited
        self._unanswered: dict[NodeId, int] = {}
        self._full: dict[tuple[NodeId, str], _FullNode] = {}
        self._starts: deque[float] = deque()
        self._active_since = -math.inf
        self._dispatching = False

    # --- what the entry does

    def join(self, ticket: Ticket, lane: QueueLane, now: float) -> None:
        """Puts a ticket into the lane, or back to its place there after an open that failed; places it if it is first."""
        if self._lane_of.get(ticket.number, lane) != lane:
            self.leave(ticket, now)
        self._answered(ticket)
        waits = self._lanes.setdefault(lane, _Lane())
        waits.tickets += ticket.number not in self._lane_of
        self._lane_of[ticket.number] = lane
        waits.queue.push(ticket)
        if ticket == waits.queue.head():
            waits.blocked = False  # it may go where the one that was first cannot
        self._note_demand(lane[0])
        self._dispatch(now)

    def leave(self, ticket: Ticket, now: float) -> None:
        """The ticket needs no path any more. Twice is fine."""
        lane = self._lane_of.pop(ticket.number, None)
        if lane is None:
            return
        self._answered(ticket)
        self._refused_by.pop(ticket.number, None)
        waits = self._lanes[lane]
        waits.queue.forget(ticket)
        waits.tickets -= 1
        waits.blocked = False
        if not waits.tickets:
            del self._lanes[lane]
        self._note_demand(lane[0])
        self._dispatch(now)

    def opened(self, ticket: Ticket, now: float) -> None:
        """Its path took it: it leaves the queue."""
        self._drop_old_starts(now)
        if not self._starts:
            self._active_since = now
        self._starts.append(now)
        self.leave(ticket, now)

    def refused(self, ticket: Ticket, node: NodeId, now: float) -> None:
        """`node` has no room for it, and counts as full; the ticket joins again when its request asks for another path."""
        lane = self._lane_of.get(ticket.number)
        if lane is not None:
            self._answered(ticket)
            self._refused_by.setdefault(ticket.number, set()).add(node)
            self.node_full(node, lane[0], now)

    def granted(self, node: NodeId, model: str, count: int, now: float) -> None:
        """`node` grants `count` places for requests of `model`."""
        full = self._full.get((node, model))
        if full is None:
            return  # nothing waits for it any more, and it was sent that
        full.received_total += count
        full.probe_at = now + PROBE_S
        full.changed()
        full.credits.extend([now + CREDIT_S] * count)
        self._unblock(model)
        self._dispatch(now)

    def node_gone(self, node: NodeId, now: float) -> None:
        """`node` died, left or restarted: what it refused and granted counts no longer."""
        for key in [key for key in self._full if key[0] == node]:
            del self._full[key]
        self._unanswered.pop(node, None)
        self.view_changed(now)

    def view_changed(self, now: float) -> None:
        """Nodes or their spans changed: first tickets that found no path are tried again."""
        for lane in self._lanes.values():
            lane.blocked = False
        self._dispatch(now)

    def tick(self, now: float) -> None:
        """Drops credits whose time is over, and probes full nodes that have been silent."""
        for full in self._full.values():
            while full.credits and full.credits[0] <= now:
                full.credits.popleft()
                full.changed()
            if not full.credits and now >= full.probe_at:
                full.probe_at = now + PROBE_S
                full.credits.append(now + CREDIT_S)
                for lane in self._lanes.values():
                    lane.blocked = False
        for lane in self._lanes.values():
            if lane.blocked and now >= lane.widen_at:
                lane.blocked, lane.widen_at = False, math.inf
        self._dispatch(now)

    @property
    def deadline(self) -> float:
        """When `tick` or `due_demands` next has something to do; infinite while no node is full."""
        times = [math.inf, *(lane.widen_at for lane in self._lanes.values() if lane.blocked)]
        for full in self._full.values():
            times += [full.credits[0] if full.credits else full.probe_at, full.send_at]
        return min(times)

    # --- what is to be sent

    def due_demands(self, now: float) -> list[Demand]:
        """Returns the demands to send now: new ones, those to renew, and empty ones for nodes nothing waits for any more."""
        due: list[Demand] = []
        for (node, model), full in list(self._full.items()):
            heads = self._heads(model)
            if not heads and not self._unanswered.get(node):
                del self._full[node, model]
                due.append(Demand(node, model, (), full.received_total))
            elif now >= full.send_at:
                full.sent_at, full.send_at = now, now + RENEW_S
                due.append(Demand(node, model, heads, full.received_total))
        return due

    # --- what it looks like

    def __len__(self) -> int:
        """Tickets that wait for room; those whose path is being opened are not counted."""
        return sum(len(lane.queue) for lane in self._lanes.values())

    def __contains__(self, ticket: Ticket) -> bool:
        """Whether the ticket waits, or its path is being opened."""
        return ticket.number in self._lane_of

    def start_rate(self, now: float) -> float:
        """Requests that started in a second, on average over the last ten; at least a tenth."""
        self._drop_old_starts(now)
        window_s = min(RATE_WINDOW_S, max(MIN_RATE_WINDOW_S, now - self._active_since))
        return max(1, len(self._starts)) / window_s

    def _drop_old_starts(self, now: float) -> None:
        while self._starts and self._starts[0] < now - RATE_WINDOW_S:
            self._starts.popleft()

    def expected_wait_s(self, lane: QueueLane, priority: int, now: float) -> float:
        """Returns the time until a request that joins now would start: those before it, at the rate of the last starts."""
        waits = self._lanes.get(lane)
        return waits.queue.ahead_of(priority) / self.start_rate(now) if waits is not None else 0.0

    def last(self, lane: QueueLane) -> Ticket | None:
        """The waiting ticket that would be served last."""
        return self._lanes[lane].queue.last() if lane in self._lanes else None

    def full_nodes(self) -> frozenset[NodeId]:
        return frozenset(node for (node, _), full in self._full.items() if not full.credits)

    # --- placing

    def _dispatch(self, now: float) -> None:
        """Places first tickets, of all lanes in their order, until each lane is empty or finds no path."""
        assert not self._dispatching, "`place` called the queue back"
        self._dispatching = True
        try:
            while heads := [
                (ticket.rank, key)
                for key, lane in self._lanes.items()
                if not lane.blocked and (ticket := lane.queue.head()) is not None
            ]:
                _, key = min(heads)
                self._place_head(key, self._lanes[key], now)
        finally:
            self._dispatching = False

    def _place_head(self, key: QueueLane, lane: _Lane, now: float) -> None:
        model, ticket = key[0], lane.queue.head()
        assert ticket is not None
        without = {node for (node, of), full in self._full.items() if of == model and not full.credits}
        refused_by = self._refused_by.get(ticket.number, set())
        without |= refused_by
        without |= {node for node, opens in self._unanswered.items() if opens >= OPENS_AT_ONCE}
        tired = len(refused_by) > MAX_REROUTES
        nodes = None if tired else self._place(ticket, frozenset(without))
        if nodes is None:
            lane.blocked = True
            lane.widen_at = now + WIDEN_S if tired else math.inf
            for node in self._refused_by.pop(ticket.number, ()):  # one may have counted as free again meanwhile
                if (node, model) not in self._full:
                    self.node_full(node, model, now)
            return
        lane.queue.take(ticket)
        for node in nodes:
            full = self._full.get((node, model))
            if full is not None and full.credits:
                full.credits.popleft()
                full.changed()
            self._unanswered[node] = self._unanswered.get(node, 0) + 1
        self._opening[ticket.number] = _Opening(key, nodes)

    def node_full(self, node: NodeId, model: str, now: float) -> None:
        """Takes no more of the model than `node` grants from now on."""
        full = self._full.setdefault((node, model), _FullNode(now + PROBE_S, now))
        full.credits.clear()
        full.probe_at = now + PROBE_S
        full.changed()

    def _answered(self, ticket: Ticket) -> None:
        """The ticket's open was answered or given up."""
        opening = self._opening.pop(ticket.number, None)
        for node in opening.nodes if opening is not None else ():
            left = self._unanswered.get(node, 0) - 1
            if left > 0:
                self._unanswered[node] = left
            else:
                self._unanswered.pop(node, None)
            if left == OPENS_AT_ONCE - 1:
                for lane in self._lanes.values():
                    lane.blocked = False

    def _unblock(self, model: str) -> None:
        for key, lane in self._lanes.items():
            if key[0] == model:
                lane.blocked = False

    def _note_demand(self, model: str) -> None:
        """The first of those that wait changed: stages whose list is short are to know."""
        waiting = self._waiting_for(model)
        for (_, of), full in self._full.items():
            if of == model and waiting <= MAX_HEADS:
                full.changed()

    def _waiting_for(self, model: str) -> int:
        return sum(len(lane.queue) for key, lane in self._lanes.items() if key[0] == model)

    def _heads(self, model: str) -> tuple[Ticket, ...]:
        lanes = [lane.queue for key, lane in self._lanes.items() if key[0] == model]
        if len(lanes) == 1:
            return tuple(lanes[0].first(MAX_HEADS))
        first = [ticket for queue in lanes for ticket in queue.first(MAX_HEADS)]
        return tuple(sorted(first, key=lambda ticket: ticket.rank)[:MAX_HEADS])
