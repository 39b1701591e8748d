"""The simulations that `bench.membership` asks for, each by its name; and a process that runs those whose names it reads.

`python -m bench.membership_runs` reads one name a line on stdin, and prints what came of it as one line of JSON; it ends with
stdin, so none outlives its parent. The name defines the run: the same name is the same run, on any machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from membership.simulation.checkers import converged
from membership.simulation.collector import seldom_collecting
from membership.simulation.network import Network
from membership.simulation.scenario import Scenario, simulate

LOSS = 0.01
# Nodes: runs when quick, runs otherwise.
CRASHED = {8: (10, 100), 100: (3, 30), 1000: (1, 5), 10_000: (0, 2)}
SILENT = {8: (10, 100), 100: (2, 30), 1000: (0, 3), 10_000: (0, 1)}
WATCH_S = {"kill_host_up": 3.0, "silent": 20.0}
# Nodes, starved ones and loss: likewise.
STARVED = {(50, 5, 0.05): (2, 200), (50, 1, 0.05): (0, 50), (50, 5, 0.01): (0, 50), (200, 20, 0.05): (0, 10)}
STARVED_WATCH_S = 30.0
CUT_S = {5: (1, 10), 60: (1, 10), 600: (0, 2), 3600: (0, 1)}
CUT_NODES = 50
JOINS = (3, 30)
JOINING = 100
IDLE = (50, 200, 1000)
IDLE_FROM_S = 10.0  # a node's first eight pings carry its point
IDLE_OVER_S = 15.0  # every sixteenth ping carries a point, and there is one ping each 0.8 s
GIVEN_UP_S = 120.0
WALL_S = 60.0  # virtual seconds of the mesh that is timed

PARTS = ("kill_host_up", "silent", "starved", "partition_heal_s", "join_100_s", "bytes_per_node_s")


@dataclass(frozen=True, slots=True)
class Run:
    """`cell`: what it is one of several runs of. `work`: nodes times virtual seconds, for the order."""

    part: str
    cell: str
    seed: int
    work: float
    ask: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.part} {self.cell} seed {self.seed}"


def asked(quick: bool) -> list[Run]:
    """All runs, the longest first, so that no core waits for the last one."""
    column = 0 if quick else 1
    runs: list[Run] = []
    for part, sizes in (("kill_host_up", CRASHED), ("silent", SILENT)):
        for nodes, counts in sizes.items():
            scenarios = [
                Scenario(nodes, seed, LOSS, 1, part == "silent", watch_s=WATCH_S[part]) for seed in range(counts[column])
            ]
            runs += [_deaths(part, str(nodes), scenario) for scenario in scenarios]
    for (nodes, starved, loss), counts in STARVED.items():
        cell = f"nodes={nodes} starved={starved / nodes:.0%} loss={loss:.0%}"
        scenarios = [Scenario(nodes, seed, loss, 1, True, starved, STARVED_WATCH_S) for seed in range(counts[column])]
        runs += [_deaths("starved", cell, scenario) for scenario in scenarios]
    runs += [_heal(seed, cut_s) for cut_s, counts in CUT_S.items() for seed in range(counts[column])]
    runs += [_join(seed) for seed in range(JOINS[column])]
    runs += [_idle(nodes) for nodes in IDLE]
    return sorted(runs, key=lambda run: (-run.work, run.name))


def heal_s(seed: int, cut_s: float) -> float | None:
    """Seconds of virtual time from the end of a half-and-half partition to one view; None: it never came."""
    network = Network(seed, loss=LOSS, encoded=False)
    ids = network.grow(CUT_NODES)
    network.cut(ids[: CUT_NODES // 2], ids[CUT_NODES // 2 :])
    network.run(cut_s)
    network.heal()
    return _until_converged(network, step_s=0.05)


def join_s(seed: int, nodes: int = JOINING) -> float | None:
    """Seconds of virtual time until nodes that join at once through one seed have one view; None: they never did."""
    network = Network(seed, loss=LOSS, encoded=False)
    first = network.add()
    for _ in range(nodes - 1):
        network.add([first])
    return _until_converged(network, step_s=0.02)


def idle_bytes_s(nodes: int) -> float:
    """What a node sends a second, sealed, in a mesh where nothing happens."""
    network = Network(1, encoded=False)
    network.found(nodes)
    network.run(IDLE_FROM_S)
    sent = sum(it.bytes_sent for it in network.nodes.values())
    network.run(IDLE_OVER_S)
    return (sum(it.bytes_sent for it in network.nodes.values()) - sent) / nodes / IDLE_OVER_S


def large_wall_s(nodes: int = 10_000) -> float:
    """Wall seconds for `WALL_S` of the life of a mesh, in one process: made, one node killed, all informed."""
    began_s = time.perf_counter()
    with seldom_collecting():
        network = Network(1, loss=LOSS, encoded=False)
        ids = network.found(nodes)
        network.run(WALL_S / 2 - network.now)
        network.crash(ids[nodes // 2])
        network.run(WALL_S - network.now)
    return time.perf_counter() - began_s


def _deaths(part: str, cell: str, scenario: Scenario) -> Run:
    def ask() -> dict[str, Any]:
        outcome = simulate(scenario)
        return {"deaths": [asdict(death) for death in outcome.deaths if death.heard], "false_deaths": outcome.false_deaths} | {
            "unheard": sum(death.observers - death.heard for death in outcome.deaths)
        }

    return Run(part, cell, scenario.seed, scenario.nodes * (scenario.watch_s + 9), ask)


def _heal(seed: int, cut_s: float) -> Run:
    return Run("partition_heal_s", f"{cut_s:g}", seed, CUT_NODES * (cut_s + 9), lambda: {"s": heal_s(seed, cut_s)})


def _join(seed: int) -> Run:
    return Run("join_100_s", str(JOINING), seed, JOINING * 20, lambda: {"s": join_s(seed)})


def _idle(nodes: int) -> Run:
    return Run("bytes_per_node_s", str(nodes), 1, nodes * (IDLE_FROM_S + IDLE_OVER_S), lambda: {"bytes_s": idle_bytes_s(nodes)})


def _until_converged(network: Network, step_s: float) -> float | None:
    try:
        return network.run_until(lambda: converged(network), within_s=GIVEN_UP_S, step_s=step_s)
    except AssertionError:
        return None


def main() -> None:
    known = {run.name: run for quick in (True, False) for run in asked(quick)}
    for name in sys.stdin:
        began_s = time.process_time()
        if name.strip() == "sim_10000_wall_s":
            came: dict[str, Any] = {"s": large_wall_s()}
        else:
            with seldom_collecting():
                came = known[name.strip()].ask()
        print(json.dumps(came | {"cpu_s": round(time.process_time() - began_s, 3)}), flush=True)


if __name__ == "__main__":
    main()
