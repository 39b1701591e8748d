"""A mesh in virtual time where every node is an entry: policies side by side on gossip that is a second old.

Each node has eight places and a queue; speeds are unlike; load is gossiped once a second. What is asserted is the
shape that the design rests on: the better of two random peers, corrected by own dispatches, beats the minimum over all
(everybody runs to the same peer) and round robin (slow peers drown); refusals by the receiver beat both by far.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from random import Random
from typing import Any

from mesh.ids import NodeId
from mesh.view import Load, Peer
from routing.admission import RefusalHistory
from routing.dispatches import Dispatch, DispatchedWork, Dispatches
from routing.policies import PeerCandidate, Policy, policy_named
from routing.score import PoolMeans, RequestWork, ScoreTerms, costs, pool_of
from tests.routing.meshes import LAYERS, MODEL, peer

NODES, PLACES, SERVICE_S, UTILISATION = 16, 8, 4.0, 0.85
SPEEDS = [(0.5, 1.0, 1.0, 2.0)[index % 4] for index in range(NODES)]
GOSSIP_S, GOSSIP_DELAY_S = 1.0, 0.2
HORIZON_S, WARM_S = 120.0, 30.0
OUTPUT_TOKENS = 100
NAMES = [NodeId(f"n{index:02}") for index in range(NODES)]


class LeastCost:
    """The herd: the minimum over all peers."""

    name = "least_cost"

    def pick(self, candidates: Sequence[PeerCandidate], work: RequestWork, rng: Random) -> list[PeerCandidate]:
        return sorted(rng.sample(candidates, len(candidates)), key=lambda candidate: candidate.cost_ms)


@dataclass
class Entry:
    """The records that one node has of the others, and of its own dispatches."""

    policy: Policy
    peers: dict[NodeId, Peer]
    pool: PoolMeans
    dispatches: Dispatches = field(default_factory=Dispatches)


@dataclass
class Server:
    busy: int = 0
    queue: list[tuple[float, int, Dispatch, float]] = field(default_factory=list)  # (arrived, entry, dispatch, service)

    def load(self, speed: float) -> Load:
        step_ms = SERVICE_S * 1000.0 / OUTPUT_TOKENS / speed
        return Load(running=self.busy, waiting=len(self.queue), step_ms=step_ms)


class Mesh:
    def __init__(self, policy: str, seed: int, *, refuse: bool = False) -> None:
        self.rng = Random(seed)
        self.refuse = refuse
        self.servers = [Server() for _ in range(NODES)]
        at_rest = {name: peer(name, (0, LAYERS), load=Server().load(speed)) for name, speed in zip(NAMES, SPEEDS)}
        self.entries = [
            Entry(
                LeastCost() if policy == "least_cost" else policy_named(policy), dict(at_rest), pool_of(at_rest.values(), MODEL)
            )
            for _ in range(NODES)
        ]
        self.events: list[tuple[float, int, str, tuple[Any, ...]]] = []
        self.order = count()
        self.waits_s: list[float] = []

    def mean_wait_s(self) -> float:
        rate = UTILISATION * PLACES * sum(SPEEDS) / SERVICE_S
        self.at(0.0, "arrive")
        for node in range(NODES):
            self.at(self.rng.random() * GOSSIP_S, "gossip", node)
        while self.events and self.events[0][0] <= HORIZON_S:
            now, _, what, details = heapq.heappop(self.events)
            match what:
                case "arrive":
                    self.at(now + self.rng.expovariate(rate), "arrive")
                    self.arrive(now, self.rng.randrange(NODES))
                case "finish":
                    self.finish(now, *details)
                case "gossip":
                    self.gossip(now, *details)
                case "load arrives":
                    self.receive_load(now, *details)
        return sum(self.waits_s) / len(self.waits_s)

    def at(self, when: float, what: str, *details: object) -> None:
        heapq.heappush(self.events, (when, next(self.order), what, details))

    def arrive(self, now: float, entry: int) -> None:
        records, history = self.entries[entry], RefusalHistory()
        chosen = self.choose(now, entry, frozenset())
        while self.refuse and self.servers[chosen].busy >= PLACES:
            self.receive_load(now, chosen, self.servers[chosen].load(SPEEDS[chosen]), entry)
            if history.refused(NAMES[chosen], 1.0, self.rng) is not None:
                break
            chosen = self.choose(now, entry, history.excluded)
        sent = records.dispatches.dispatch(NAMES[chosen], now)
        self.servers[chosen].queue.append((now, entry, sent, self.rng.expovariate(1.0 / SERVICE_S)))
        self.serve(now, chosen)

    def choose(self, now: float, entry: int, excluded: frozenset[NodeId]) -> int:
        records, work = self.entries[entry], RequestWork(output_tokens=OUTPUT_TOKENS)
        candidates = []
        for name, known in records.peers.items():
            if name in excluded:
                continue
            own = records.dispatches.own(name, known.load_at)

            def price(known: Peer = known, own: DispatchedWork = own) -> ScoreTerms:
                return costs(known, LAYERS, LAYERS, work, records.pool, now, me=NAMES[entry], own=own)

            candidates.append(PeerCandidate(name, price, in_flight=own.in_flight, response_ms=own.response_ms))
        return NAMES.index(records.policy.pick(candidates, work, self.rng)[0].node)

    def serve(self, now: float, node: int) -> None:
        server = self.servers[node]
        while server.queue and server.busy < PLACES:
            arrived, entry, sent, service_s = server.queue.pop(0)
            server.busy += 1
            if arrived > WARM_S:
                self.waits_s.append(now - arrived)
            self.at(now + service_s / SPEEDS[node], "finish", node, entry, sent)

    def finish(self, now: float, node: int, entry: int, sent: Dispatch) -> None:
        self.servers[node].busy -= 1
        self.entries[entry].dispatches.done(sent, now)
        self.serve(now, node)

    def gossip(self, now: float, node: int) -> None:
        self.at(now + GOSSIP_S, "gossip", node)
        load = self.servers[node].load(SPEEDS[node])
        for entry in range(NODES):
            delay_s = 0.0 if entry == node else self.rng.random() * 2 * GOSSIP_DELAY_S
            self.at(now + delay_s, "load arrives", node, load, entry)

    def receive_load(self, now: float, node: int, load: Load, entry: int) -> None:
        records, name = self.entries[entry], NAMES[node]
        records.peers[name] = peer(name, (0, LAYERS), load=load, load_at=now)
        records.pool = pool_of(records.peers.values(), MODEL) if node == entry else records.pool


@cache
def mean_wait_s(policy: str, *, refuse: bool = False) -> float:
    return Mesh(policy, seed=1, refuse=refuse).mean_wait_s()


def test_power_of_two_waits_less_than_the_minimum_and_round_robin() -> None:
    assert mean_wait_s("power_of_two") < 0.7 * mean_wait_s("least_cost")
    assert mean_wait_s("power_of_two") < 0.3 * mean_wait_s("round_robin")


def test_peers_that_refuse_cut_the_wait_also_for_the_default_policy() -> None:
    assert mean_wait_s("power_of_two", refuse=True) < 0.2 * mean_wait_s("power_of_two")
    assert mean_wait_s("mesh", refuse=True) < 0.2 * mean_wait_s("power_of_two")
