"""One scenario for a simulated mesh: the detection times of some deaths, and the false deaths of live nodes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from membership.simulation.checkers import converged, detection_s, fallen_s, percentile
from membership.simulation.collector import seldom_collecting
from membership.simulation.disturbances import Churn, Partition, cut_some_ways
from membership.simulation.network import Network
from mesh.ids import NodeId
from mesh.view import PeerState

SETTLE_S = 3.0
WATCH_S = 15.0  # after each death
HEAL_MAX_S = 60.0
MAX_JOINED = 50  # larger meshes start with all members known: joining is measured apart, and takes seconds for a hundred


@dataclass(frozen=True, slots=True)
class Scenario:
    """`silent`: the hosts of the killed vanish too, so no refusal shows that they are dead. `delay_ms`: of one way, on average.

    `one_way`: so many ways between two nodes carry nothing in one direction. `churn_a_minute`: so many nodes go and come back
    while deaths are watched. `partition_s`: for so long, after all deaths, the mesh is cut in two halves.
    """

    nodes: int
    seed: int = 1
    loss: float = 0.0
    kill: int = 1
    silent: bool = False
    starved: int = 0
    watch_s: float = WATCH_S
    delay_ms: float = 1.25
    one_way: int = 0
    churn_a_minute: float = 0.0
    partition_s: float = 0.0

    @property
    def delay_span_s(self) -> tuple[float, float]:
        return 0.0004 * self.delay_ms, 0.0016 * self.delay_ms


@dataclass(frozen=True, slots=True)
class Death:
    """Seconds from the kill until the first, half, 99 % and all of the informed nodes were informed."""

    node: str
    first_s: float
    p50_s: float
    p99_s: float
    last_s: float
    passed_over_s: float  # until the last of them at least suspected it, and so gave it no new work
    heard: int
    observers: int


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """`heal_s`: from the end of the partition until all views were equal; None without a partition, or if they never were."""

    deaths: tuple[Death, ...]
    false_deaths: int  # unique (member, incarnation) of nodes that were running and reachable
    idle_bytes_node_s: float
    virtual_s: float
    wall_s: float
    trace: str
    heal_s: float | None = None
    whole: bool = True  # all views were equal after the partition
    goings: int = 0

    @property
    def well(self) -> bool:
        """No live node was declared dead, every survivor recorded every death, and all views are equal."""
        return self.whole and not self.false_deaths and all(death.heard == death.observers for death in self.deaths)


def simulate(scenario: Scenario, died: Callable[[Death], None] = lambda _: None) -> ScenarioResult:
    """Runs the scenario: equal scenarios give equal outcomes, but for `wall_s`. `died` is called with each watched death."""
    with seldom_collecting():
        return _lived(scenario, died)


def _lived(scenario: Scenario, died: Callable[[Death], None]) -> ScenarioResult:
    began_s = time.perf_counter()
    network = Network(scenario.seed, loss=scenario.loss, delay_s=scenario.delay_span_s, encoded=False)
    ids = network.grow(scenario.nodes) if scenario.nodes <= MAX_JOINED else network.found(scenario.nodes)
    network.run(SETTLE_S)
    sent, from_s = sum(it.bytes_sent for it in network.nodes.values()), network.now
    network.run(SETTLE_S)
    idle = (sum(it.bytes_sent for it in network.nodes.values()) - sent) / scenario.nodes / (network.now - from_s)
    chosen = network.rng.sample(ids, min(scenario.nodes, scenario.kill + scenario.starved))
    for node in chosen[scenario.kill :]:
        network.starve(node)
    network.run(SETTLE_S if scenario.starved else 0.0)
    rng = Random(scenario.seed)
    cut_some_ways(network, sorted(set(ids) - set(chosen)), scenario.one_way, rng)
    churn = Churn(network, sorted(set(ids) - set(chosen)), scenario.churn_a_minute, rng)
    deaths: list[Death] = []
    for node in chosen[: scenario.kill]:
        deaths.append(_death(network, node, scenario, churn))
        died(deaths[-1])
    if not deaths and (scenario.churn_a_minute or scenario.one_way or scenario.starved):
        churn.run(scenario.watch_s)
    partition, heal_s = None, None
    if scenario.partition_s:
        partition = Partition(network)
        network.run(scenario.partition_s)
        network.heal()
        heal_s = _heal_s(network)
    wronged = _wronged(network, partition)
    wall_s = time.perf_counter() - began_s
    whole = partition is None or heal_s is not None
    return ScenarioResult(tuple(deaths), len(wronged), idle, network.now, wall_s, network.trace(), heal_s, whole, churn.goings)


def _death(network: Network, node: NodeId, scenario: Scenario, churn: Churn) -> Death:
    """Kills the node, and watches until its death has spread."""
    killed_at = network.now
    (network.kill if scenario.silent else network.crash)(node)
    churn.run(scenario.watch_s)
    took = detection_s(network, node, killed_at)
    passed_over_s = max(fallen_s(network, node, killed_at), default=math.nan)
    first_s, p50_s, p99_s, last_s = (percentile(took, share) for share in (0.0, 0.5, 0.99, 1.0))
    up = network.up
    heard = sum(network.state(by, node) is PeerState.DEAD for by in up)
    return Death(node, first_s, p50_s, p99_s, last_s, passed_over_s, heard, len(up))


def _heal_s(network: Network) -> float | None:
    """Returns the seconds until all views are equal again; None if they are not within `HEAL_MAX_S`."""
    try:
        return network.run_until(lambda: converged(network), within_s=HEAL_MAX_S)
    except AssertionError:
        return None


def _wronged(network: Network, partition: Partition | None) -> set[tuple[NodeId, int]]:
    """Returns the nodes declared dead while they ran, by a node that could reach them; each incarnation once."""
    return {
        (seen.node, seen.incarnation)
        for seen in network.seen
        if seen.after is PeerState.DEAD
        and seen.before is not PeerState.DEAD
        and seen.runs
        and not (partition is not None and partition.excuses(seen.at, seen.by, seen.node))
    }
