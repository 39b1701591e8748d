"""One question to a simulated mesh: some nodes die, how soon does everybody know, and who was wronged?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from membership.simulation.checkers import deaths_of, detection_s, fallen_s, percentile
from membership.simulation.network import Network
from mesh.view import PeerState

SETTLE_S = 3.0
WATCH_S = 15.0  # after each death
JOINED_MAX = 200  # larger meshes start with everyone known: joining is measured apart


@dataclass(frozen=True, slots=True)
class Scenario:
    """`silent`: the hosts of the killed vanish too, so that nobody can say that they are dead."""

    nodes: int
    seed: int = 1
    loss: float = 0.0
    kill: int = 1
    silent: bool = False
    starved: int = 0
    watch_s: float = WATCH_S


@dataclass(frozen=True, slots=True)
class Death:
    """Seconds from the kill until the first, half, 99 % and all of those who ever heard of it had heard."""

    node: str
    first_s: float
    p50_s: float
    p99_s: float
    last_s: float
    passed_over_s: float  # when the last of them had at least suspected it, and so gave it no new work
    heard: int
    observers: int


@dataclass(frozen=True, slots=True)
class Outcome:
    deaths: tuple[Death, ...]
    false_deaths: int  # unique (member, incarnation) of nodes that lived
    idle_bytes_node_s: float
    virtual_s: float
    wall_s: float
    trace: str

    @property
    def well(self) -> bool:
        """Nobody was wronged and every survivor heard of every death."""
        return not self.false_deaths and all(death.heard == death.observers for death in self.deaths)


def simulate(scenario: Scenario) -> Outcome:
    """Runs it: the same scenario gives the same outcome, but for `wall_s`."""
    began_s = time.perf_counter()
    network = Network(scenario.seed, loss=scenario.loss)
    ids = network.grow(scenario.nodes) if scenario.nodes <= JOINED_MAX else network.found(scenario.nodes)
    network.run(SETTLE_S)
    sent, from_s = sum(it.bytes_sent for it in network.nodes.values()), network.now
    network.run(SETTLE_S)
    idle = (sum(it.bytes_sent for it in network.nodes.values()) - sent) / scenario.nodes / (network.now - from_s)
    chosen = network.rng.sample(ids, min(scenario.nodes, scenario.kill + scenario.starved))
    for node in chosen[scenario.kill :]:
        network.starve(node)
    network.run(SETTLE_S if scenario.starved else 0.0)
    deaths = []
    for node in chosen[: scenario.kill]:
        killed_at = network.now
        (network.kill if scenario.silent else network.crash)(node)
        network.run(scenario.watch_s)
        took = detection_s(network, node, killed_at)
        passed_over_s = max(fallen_s(network, node, killed_at), default=math.nan)
        first_s, p50_s, p99_s, last_s = (percentile(took, share) for share in (0.0, 0.5, 0.99, 1.0))
        up = set(network.up)
        unheard = sum(network.state(by, node) is not PeerState.DEAD for by in up)
        deaths.append(Death(node, first_s, p50_s, p99_s, last_s, passed_over_s, len(up) - unheard, len(up)))
    wronged = {(node, network.nodes[by].core.swim.members[node].incarnation) for _, by, node in deaths_of(network, network.up)}
    wall_s = time.perf_counter() - began_s
    return Outcome(tuple(deaths), len(wronged), idle, network.now, wall_s, network.trace())
