"""A mesh under overload in virtual time: real cores of entry and stages, clients that retry as the official SDK does.

Each node is an entry and a stage with `PLACES` sequences at a time. The cores are the product's: `EntryQueue`, `RoomGrants`,
`Generation`, `Planning` and `Admission`; what is made up is the network, the time that a sequence takes, and the clients.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from random import Random
from types import MappingProxyType

from mesh.errors import MeshError, Refused
from mesh.ids import NodeId, StreamId
from mesh.view import Load, View
from node.engine.api import SequenceKey
from node.entry.generation import (
    ClosePath,
    EmitToken,
    Fail,
    Finish,
    Generation,
    GenerationEffect,
    GenerationEvent,
    NoPathFound,
    Opened,
    OpenPath,
    OpenRefused,
    PathPlanned,
    PeerGone,
    PlanPath,
    StageLost,
    TokenDrawn,
)
from node.entry.planning import Planning, PlanRequest
from routing.admission import Admission, Queue
from routing.entry_queue import EntryQueue
from routing.fair_queue import Ticket
from routing.room_grants import RoomGrants, WaitingRequest
from tests.routing.meshes import LAYERS, MODEL, peer

PLACES = 16
SERVICE_S = 2.0  # mean time of a sequence on a node of speed 1
FIRST_TOKEN_SHARE = 0.2  # of it, until the first token
NETWORK_S = 0.001
VERDICT_S = 0.3  # from a node's death until all others count it as dead
SDK_RETRIES = 2
DEADLINE_S = 600.0
LANE = (str(MODEL), "w1")


@dataclass(frozen=True)
class Faults:
    """What may be planted."""

    unordered: bool = False  # the newest waiting request is served first
    polling: bool = False  # a refused request is tried again ten times a second
    late_is_lost: bool = False  # an open without an answer within 0.5 s counts as a lost node
    no_renewal: bool = False  # demand is sent once, and a place stays reserved for ever


@dataclass
class Client:
    number: int
    tenant: str = ""
    again_after_s: float | None = None  # closed loop: the time from an answer to the next request


@dataclass
class Asked:
    """One request as its client sees it, over its attempts."""

    client: Client
    first_at: float
    retries: int = 0


@dataclass
class Running:
    """One request at its entry."""

    asked: Asked
    ticket: Ticket
    core: Generation
    stream: StreamId
    planned: PlanPath | None = None
    spoke: bool = False


@dataclass
class Totals:
    asked: int = 0
    done: int = 0
    refused: int = 0  # answered 503 with Retry-After, an attempt each
    given_up: int = 0  # refused three times
    failed: int = 0  # any other error
    cut: int = 0  # by the death of the entry, after a token
    opens: int = 0
    opens_refused: int = 0
    overtaken: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    waits_s: list[tuple[float, float]] = field(default_factory=list)  # (began, wait)
    tenants: list[tuple[str, float]] = field(default_factory=list)  # (tenant, wait)
    done_at: list[float] = field(default_factory=list)


class Node:
    def __init__(self, mesh: Mesh, name: NodeId, speed: float) -> None:
        self.mesh, self.name, self.speed = mesh, name, speed
        self.alive = True
        self.lag_s: Callable[[], float] = lambda: 0.0
        self.start()

    def start(self) -> None:
        """A new process."""
        self.life = next(self.mesh.order)
        self.queue = EntryQueue(self.place)
        self.admission = Admission()
        self.planning = Planning(self.mesh.view_of(self.name), lambda: self.mesh.now, Random(self.life))
        self.runs: dict[int, Running] = {}
        self.grants = RoomGrants()
        self.sequences: dict[SequenceKey, NodeId] = {}
        self.wake_at = math.inf

    @property
    def room(self) -> int:
        return PLACES - len(self.sequences)

    # --- entry

    def request(self, asked: Asked) -> None:
        now = self.mesh.now
        queue = Queue(len(self.runs), len(self.queue), self.queue.expected_wait_s(LANE, 0, now), self.queue.start_rate(now))
        try:
            self.admission.admit(queue, now, retries=asked.retries)
        except Refused as error:
            self.mesh.refused(asked, error.retry_after_s)
            return
        number = next(self.mesh.order)
        ticket = Ticket(number, now, tenant=asked.client.tenant)
        run = Running(asked, ticket, Generation(10, now + DEADLINE_S), StreamId(str(number)))
        self.runs[number] = run
        self.mesh.waiting[number] = now
        self.carry_out(run, run.core.start(now))

    def place(self, ticket: Ticket, without: frozenset[NodeId]) -> tuple[NodeId, ...] | None:
        run = self.runs[ticket.number]
        assert run.planned is not None
        try:
            path = self.planning.plan(
                PlanRequest(MODEL, LAYERS, "w1", 10, 100, run.planned.exclude | without, "", "", avoid=run.planned.avoid)
            )
        except MeshError as error:
            if without:
                return None
            found = NoPathFound(run.core.attempt, error)
            self.mesh.after(0.0, self, lambda: self.receive(run, found))
            return ()
        attempt = run.core.attempt
        self.planning.dispatched(SequenceKey(run.stream, 0, attempt), path.stages, 10)
        self.mesh.after(0.0, self, lambda: self.receive(run, PathPlanned(attempt, path.stages)))
        return tuple(stage.node for stage in path.stages)

    def receive(self, run: Running, event: GenerationEvent) -> None:
        if not run.core.ended:
            self.carry_out(run, run.core.receive(event, self.mesh.now))

    def carry_out(self, run: Running, effects: list[GenerationEffect]) -> None:
        mesh = self.mesh
        for effect in effects:
            match effect:
                case PlanPath():
                    run.planned = effect
                    run.ticket = replace(run.ticket, continued=bool(run.core.tokens))
                    self.queue.join(run.ticket, LANE, mesh.now)
                case OpenPath(attempt=attempt, path=path):
                    self.open(run, SequenceKey(run.stream, 0, attempt), mesh.nodes[path[0].node], attempt)
                case EmitToken():
                    run.spoke = True
                case ClosePath(attempt=attempt, path=path):
                    key = SequenceKey(run.stream, 0, attempt)
                    self.planning.finished(key, ok=run.core.ended, lost=effect.lost)
                    stage = mesh.nodes[path[0].node]
                    mesh.send(self, stage, partial(stage.end, key))
                case Finish():
                    mesh.totals.done += 1
                    mesh.totals.done_at.append(mesh.now)
                    self.over(run)
                case Fail(error=error):
                    name = type(error).__name__
                    mesh.totals.errors[name] = mesh.totals.errors.get(name, 0) + 1
                    mesh.totals.failed += 1
                    self.over(run)
        self.settle()

    def over(self, run: Running) -> None:
        self.queue.leave(run.ticket, self.mesh.now)
        del self.runs[run.ticket.number]
        self.mesh.waiting.pop(run.ticket.number, None)
        self.mesh.answered(run.asked)

    def open(self, run: Running, key: SequenceKey, stage: Node, attempt: int) -> None:
        mesh, answered = self.mesh, [False]
        mesh.totals.opens += 1

        def opened() -> None:
            answered[0] = True
            self.queue.opened(run.ticket, mesh.now)
            mesh.started(run.ticket)
            self.receive(run, Opened(attempt))

        def refused() -> None:
            answered[0] = True
            mesh.totals.opens_refused += 1
            self.planning.finished(key, ok=False)
            if run.core.attempt != attempt or run.core.ended:
                return
            if mesh.faults.polling:
                self.queue.leave(run.ticket, self.mesh.now)
                mesh.after(0.1, self, lambda: self.receive(run, OpenRefused(attempt, stage.name)))
                return
            self.queue.refused(run.ticket, stage.name, mesh.now)
            self.receive(run, OpenRefused(attempt, stage.name))

        def late() -> None:
            if not answered[0] and not run.core.ended:
                self.receive(run, StageLost(attempt, stage.name, "late", unreachable=True))

        if not stage.alive:
            mesh.after(NETWORK_S, self, lambda: self.receive(run, StageLost(attempt, stage.name, "refused", unreachable=True)))
            return
        if mesh.faults.late_is_lost:
            mesh.after(0.5, self, late)
        tokens = lambda position, finish: self.receive(run, TokenDrawn(attempt, position, 7, finish))  # noqa: E731
        mesh.send(self, stage, lambda: stage.on_open(self, key, opened, refused, tokens, len(run.core.tokens)))

    def granted(self, node: NodeId, number: int) -> None:
        self.queue.granted(node, LANE[0], number, self.mesh.now)
        self.settle()

    def settle(self) -> None:
        """Sends what is due, and comes back when more is."""
        mesh = self.mesh
        for demand in self.queue.due_demands(mesh.now):
            stage = mesh.nodes[demand.node]
            if mesh.faults.unordered:
                demand = demand.__class__(demand.node, demand.model, demand.heads[::-1], demand.received_total)
            heads = [WaitingRequest(each.continued, each.priority, each.arrived_at) for each in demand.heads]
            received = demand.received_total
            mesh.send(self, stage, partial(stage.on_demand, self.name, heads, received))
        at = self.queue.deadline
        if at < self.wake_at - 1e-9 and not (mesh.faults.no_renewal):
            self.wake_at = at
            mesh.after(max(0.0, at - mesh.now), self, self.wake)

    def wake(self) -> None:
        self.wake_at = math.inf
        self.queue.tick(self.mesh.now)
        self.settle()

    # --- stage

    def on_demand(self, entry: NodeId, heads: list[WaitingRequest], received: int) -> None:
        self.grants.demand(entry, heads, received, self.mesh.now)
        self.grant()

    def grant(self) -> None:
        mesh = self.mesh
        now = 0.0 if mesh.faults.no_renewal else mesh.now
        for entry, number in self.grants.grant(self.room, now).items():
            node = mesh.nodes[entry]
            if mesh.rng.random() >= mesh.lost_grants:
                mesh.send(self, node, partial(node.granted, self.name, number))

    def on_open(
        self,
        entry: Node,
        key: SequenceKey,
        opened: Callable[[], None],
        refused: Callable[[], None],
        token: Callable[[int, str | None], None],
        known: int,
    ) -> None:
        mesh = self.mesh
        if not self.grants.admits(entry.name, self.room):
            mesh.send(self, entry, refused)
            return
        self.sequences[key] = entry.name
        mesh.send(self, entry, opened)
        took_s = mesh.rng.expovariate(1.0 / SERVICE_S) / self.speed
        first = 10 + known

        def emit(position: int, finish: str | None) -> None:
            if key in self.sequences:
                mesh.send(self, entry, lambda: token(position, finish))
                if finish is not None:
                    self.end(key)

        mesh.after(took_s * FIRST_TOKEN_SHARE, self, lambda: emit(first, None))
        mesh.after(took_s, self, lambda: emit(first + 1, "stop"))

    def end(self, key: SequenceKey) -> None:
        if self.sequences.pop(key, None) is not None:
            self.grant()


class Mesh:
    def __init__(self, speeds: list[float], seed: int = 0, faults: Faults | None = None) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.order = count()
        self.events: list[tuple[float, int, Node | None, int, Callable[[], None]]] = []
        self.faults = faults or Faults()
        self.lost_grants = 0.0
        self.arrivals: dict[tuple[NodeId, NodeId], float] = {}
        self.retries_until = math.inf
        self.totals = Totals()
        self.waiting: dict[int, float] = {}  # accepted requests that no stage took up yet, in order of arrival
        self.peers = {
            NodeId(f"n{index:03}"): peer(f"n{index:03}", (0, LAYERS), load=Load(step_ms=10.0)) for index in range(len(speeds))
        }
        self.view = View(NodeId("n000"), MappingProxyType(dict(self.peers)))
        self.nodes: dict[NodeId, Node] = {}
        for name, speed in zip(self.peers, speeds, strict=True):
            self.nodes[name] = Node(self, name, speed)
        self.capacity = sum(PLACES * speed / SERVICE_S for speed in speeds)  # requests a second

    def view_of(self, name: NodeId) -> Callable[[], View]:
        return lambda: View(name, self.view.peers, self.view.version)

    # --- time

    def after(self, delay_s: float, node: Node | None, do: Callable[[], None]) -> None:
        """Runs `do` on the node unless it has died by then; None: outside the mesh."""
        heapq.heappush(self.events, (self.now + delay_s, next(self.order), node, node.life if node is not None else 0, do))

    def send(self, sender: Node, to: Node, do: Callable[[], None]) -> None:
        """Messages between two nodes keep their order, as on a link."""
        delay_s = NETWORK_S * self.rng.uniform(0.5, 1.5) + to.lag_s() if sender is not to else 0.0
        at = max(self.now + delay_s, self.arrivals.get((sender.name, to.name), 0.0))
        self.arrivals[sender.name, to.name] = at
        self.after(at - self.now, to, do)

    def run(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, node, life, do = heapq.heappop(self.events)
            if node is None or (node.alive and node.life == life):
                do()
        self.now = until

    # --- clients

    def offer(self, rate: float, until: float, tenant: str = "") -> None:
        """Open loop: new requests at exponential times, each of another client."""

        def arrive() -> None:
            if self.now < until:
                self.after(self.rng.expovariate(rate), None, arrive)
                self.ask(Asked(Client(next(self.order), tenant), self.now))

        self.after(0.0, None, arrive)

    def users(self, number: int, until: float) -> None:
        """Closed loop: each asks again as soon as it is answered."""
        self.closed_until = until
        for _ in range(number):
            client = Client(next(self.order), again_after_s=0.0)
            self.after(self.rng.random(), None, partial(self.begin, client))

    def begin(self, client: Client) -> None:
        self.ask(Asked(client, self.now))

    def ask(self, asked: Asked) -> None:
        live = [node for node in self.nodes.values() if node.alive]
        node = self.rng.choice(live)
        if asked.retries == 0:
            self.totals.asked += 1
        self.after(NETWORK_S + node.lag_s(), node, lambda: node.request(asked))

    def refused(self, asked: Asked, retry_after_s: float) -> None:
        self.totals.refused += 1
        self.retry(asked, retry_after_s * self.rng.uniform(1.0, 1.25))

    def retry(self, asked: Asked, after_s: float) -> None:
        if asked.retries == SDK_RETRIES or self.now > self.retries_until:
            self.totals.given_up += 1
            self.answered(asked)
            return
        asked.retries += 1
        self.after(after_s, None, lambda: self.ask(asked) if self.now <= self.retries_until else None)

    def started(self, ticket: Ticket) -> None:
        arrived = self.waiting.pop(ticket.number, None)
        if arrived is None:
            return  # it was, before a node was lost
        oldest = next(iter(self.waiting.values()), math.inf)
        self.totals.overtaken += arrived - oldest > 1.0
        self.totals.tenants.append((ticket.tenant, self.now - arrived))
        self.totals.waits_s.append((self.now, self.now - arrived))

    def answered(self, asked: Asked) -> None:
        if asked.client.again_after_s is not None and self.now < self.closed_until:
            client = asked.client
            self.after(asked.client.again_after_s, None, lambda: self.ask(Asked(client, self.now)))

    # --- violence

    def kill(self, name: NodeId) -> None:
        node = self.nodes[name]
        node.alive = False
        for run in list(node.runs.values()):
            self.waiting.pop(run.ticket.number, None)
            if run.spoke:
                self.totals.cut += 1
                self.answered(run.asked)
            else:
                self.retry(run.asked, 0.5 * 2**run.asked.retries)

        def verdict() -> None:
            self.view = View(self.view.me, MappingProxyType({n: p for n, p in self.view.peers.items() if n != name}))
            for other in self.nodes.values():
                if other.alive:
                    self.after(0.0, other, partial(other_lost, other))

        def other_lost(other: Node) -> None:
            other.planning.forget(name)
            other.grants.forget(name)
            for key in [key for key, entry in other.sequences.items() if entry == name]:
                other.end(key)
            for run in list(other.runs.values()):
                other.receive(run, PeerGone(name, "dead"))
            other.queue.node_gone(name, self.now)
            other.settle()

        self.after(VERDICT_S, None, verdict)

    def restart(self, name: NodeId) -> None:
        node = self.nodes[name]
        node.start()
        node.alive = True
        self.view = View(self.view.me, MappingProxyType({**self.view.peers, name: self.peers[name]}))
        for other in self.nodes.values():
            if other.alive:
                other.queue.node_gone(name, self.now)
                other.settle()
