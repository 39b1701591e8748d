"""How soon a mesh knows of its dead, what that costs, and whom it wrongs. In virtual time, and beside kinship on loopback.

`python -m bench.membership [--quick]` prints one JSON line. False deaths are unique (member, incarnation) pairs; with
none in n runs their rate is below 3/n with 95 % confidence. Quick leaves out 10,000 nodes and takes few seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench import processes
from bench.machine import machine
from membership.simulation.checkers import converged, percentile
from membership.simulation.network import Network
from membership.simulation.scenario import Outcome, Scenario, simulate

PEERS = Path("build/bench-peers/bin/python")
LOSS = 0.01
REAL_PROCESSES = 12
# Nodes: runs when quick, runs otherwise.
CRASHED = {8: (10, 100), 100: (3, 30), 1000: (1, 5), 10_000: (0, 2)}
SILENT = {8: (10, 100), 100: (2, 30), 1000: (0, 3), 10_000: (0, 1)}
WATCH_S = {False: 3.0, True: 20.0}  # after a crash, and after a host that fell silent
# Starved hosts and loss: runs when quick, runs otherwise.
STARVED = {(50, 5, 0.05): (2, 200), (50, 1, 0.05): (0, 50), (50, 5, 0.01): (0, 50), (200, 20, 0.05): (0, 10)}
CUT_S = {5.0: (1, 10), 60.0: (1, 10), 600.0: (0, 2), 3600.0: (0, 1)}
JOINS = (3, 30)
SIMULATED_S = 60.0


def seconds(values: list[float], share: float) -> float:
    return round(percentile(sorted(values), share), 4)


def told(outcomes: list[Outcome]) -> dict[str, Any]:
    deaths = [death for outcome in outcomes for death in outcome.deaths]
    wronged = sum(outcome.false_deaths for outcome in outcomes)
    return {
        "first_p50_s": seconds([death.first_s for death in deaths], 0.5),
        "every_node_p50_s": seconds([death.last_s for death in deaths], 0.5),
        "every_node_p99_s": seconds([death.last_s for death in deaths], 0.99),
        "passed_over_p50_s": seconds([death.passed_over_s for death in deaths], 0.5),
        "false_deaths": wronged,
        "false_deaths_a_run_95_bound": round(3 / len(outcomes), 4) if not wronged else None,
        "unheard": sum(death.observers - death.heard for death in deaths),
        "runs": len(outcomes),
    }


def heal_s(seed: int, cut_s: float, nodes: int = 50) -> float:
    """Seconds of virtual time from the end of a half-and-half partition to one view."""
    network = Network(seed, loss=LOSS)
    ids = network.grow(nodes)
    network.cut(ids[: nodes // 2], ids[nodes // 2 :])
    network.run(cut_s)
    network.heal()
    return network.run_until(lambda: converged(network), within_s=120)


def join_s(seed: int, nodes: int = 100) -> float:
    """Seconds of virtual time until nodes that join at once through one seed have one view."""
    network = Network(seed, loss=LOSS)
    first = network.add()
    for _ in range(nodes - 1):
        network.add([first])
    return network.run_until(lambda: converged(network), within_s=120, step_s=0.02)


def large_wall_s(nodes: int = 10_000) -> float:
    """Wall seconds for `SIMULATED_S` of the life of a mesh, in one process: made, one node killed, everybody told."""
    began_s = time.perf_counter()
    network = Network(1, loss=LOSS, encoded=False)
    ids = network.found(nodes)
    network.run(SIMULATED_S / 2 - network.now)
    network.crash(ids[nodes // 2])
    network.run(SIMULATED_S - network.now)
    return time.perf_counter() - began_s


def real() -> dict[str, Any]:
    """12 processes each, ours and kinship's, in one run on one machine."""
    ours = processes.measure([sys.executable, "-m", "bench.member"], REAL_PROCESSES, 3, settle_s=3.0)
    figures: dict[str, Any] = {"ours": ours, "ours_every_node_p50_s": ours["every_node_p50_s"]}
    if not PEERS.exists():
        return figures | {"kinship": None, "skipped": "kinship is not installed; run: make bench-peers"}
    theirs = processes.measure([str(PEERS), "bench/kinship_member.py"], REAL_PROCESSES, 1, settle_s=3.0)
    ratio = ours["every_node_p50_s"] / theirs["every_node_p50_s"]
    return figures | {
        "kinship": theirs,
        "kinship_every_node_p50_s": theirs["every_node_p50_s"],
        "ratio": round(ratio, 4),
    }


def simulated(pool: ProcessPoolExecutor, column: int) -> dict[str, Any]:
    """All that is measured in virtual time. `column`: of the numbers of runs, 0 when quick."""

    def kills(silent: bool) -> dict[int, list[Future[Outcome]]]:
        sizes = sorted((SILENT if silent else CRASHED).items(), reverse=True)  # the longest first, so that no core waits for it
        watch_s = WATCH_S[silent]
        return {
            nodes: [
                pool.submit(simulate, Scenario(nodes, seed, LOSS, 1, silent, watch_s=watch_s)) for seed in range(runs[column])
            ]
            for nodes, runs in sizes
            if runs[column]
        }

    asked = {silent: kills(silent) for silent in (True, False)}
    idle = {nodes: pool.submit(simulate, Scenario(nodes, 1, kill=0)) for nodes in (1000, 200, 50)}
    hungry = {
        cell: [
            pool.submit(simulate, Scenario(cell[0], seed, cell[2], 1, True, cell[1], watch_s=30.0))
            for seed in range(runs[column])
        ]
        for cell, runs in STARVED.items()
        if runs[column]
    }
    heals = {cut_s: [pool.submit(heal_s, seed, cut_s) for seed in range(runs[column])] for cut_s, runs in CUT_S.items()}
    joins = [pool.submit(join_s, seed) for seed in range(JOINS[column])]
    joined_s = sorted(future.result() for future in joins)
    return {
        **{
            name: {str(nodes): told([f.result() for f in asked[silent][nodes]]) for nodes in sorted(asked[silent])}
            for name, silent in (("kill_host_up", False), ("silent", True))
        },
        "starved": {
            f"nodes={nodes} starved={starved / nodes:.0%} loss={loss:.0%}": told([f.result() for f in futures])
            for (nodes, starved, loss), futures in hungry.items()
        },
        "partition_heal_s": {
            f"{cut_s:g}": {"max": round(max(f.result() for f in futures), 3), "runs": len(futures)}
            for cut_s, futures in heals.items()
            if futures
        },
        "join_100_s": {
            "p50": seconds(joined_s, 0.5),
            "max": round(joined_s[-1], 3),
            "within_1_s": sum(took_s < 1 for took_s in joined_s),
            "runs": len(joined_s),
        },
        "bytes_per_node_s": {str(nodes): round(idle[nodes].result().idle_bytes_node_s) for nodes in sorted(idle)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds: about a minute on two cores")
    quick = parser.parse_args().quick
    began_s = time.perf_counter()
    loopback = real()  # before the simulations, which take all cores
    with ProcessPoolExecutor(max_workers=1) as alone:
        large_s = None if quick else round(alone.submit(large_wall_s).result(), 1)
    with ProcessPoolExecutor(max_workers=2) as pool:
        figures = simulated(pool, 0 if quick else 1)
    print(
        json.dumps(
            {
                "bench": "membership",
                "command": "python -m bench.membership" + (" --quick" if quick else ""),
                "machine": machine(),
                "took_s": round(time.perf_counter() - began_s, 1),
                "real": loopback,
                **figures,
                "sim_10000_wall_s": large_s,
            }
        )
    )


if __name__ == "__main__":
    main()
