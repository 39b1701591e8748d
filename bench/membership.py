"""How soon a mesh knows of its dead, what that costs, and whom it wrongs. In virtual time, and beside kinship on loopback.

`python -m bench.membership [--quick]` prints one JSON line. False deaths are unique (member, incarnation) pairs; with
none in n runs their rate is below 3/n with 95 % confidence. Quick leaves out 10,000 nodes and takes few seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench import processes
from bench.machine import machine
from membership.simulation.checkers import converged, percentile
from membership.simulation.network import Network
from membership.simulation.scenario import Outcome, Scenario, simulate

PEERS = Path("build/bench-peers/bin/python")
LOSS = 0.01
STARVED = Scenario(50, 0, loss=0.05, kill=1, silent=True, starved=5, watch_s=30.0)
REAL_PROCESSES = 12
SIZES = {8: (10, 100), 100: (3, 30), 1000: (1, 5)}  # nodes: runs when quick, runs otherwise


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds: about a minute on two cores")
    quick = parser.parse_args().quick
    began_s = time.perf_counter()
    loopback = real()  # before the simulations, which take all cores
    with ProcessPoolExecutor(max_workers=2) as pool:
        asked = {
            silent: {
                nodes: [
                    pool.submit(simulate, Scenario(nodes, seed, LOSS, 1, silent, watch_s=20.0 if silent else 3.0))
                    for seed in range(runs[0] if quick else runs[1])
                ]
                for nodes, runs in reversed(SIZES.items())
                if not (quick and silent and nodes > 100)
            }
            for silent in (False, True)
        }
        bytes_of = {nodes: pool.submit(simulate, Scenario(nodes, 1, kill=0)) for nodes in (50, 200)}
        hungry = [
            pool.submit(simulate, Scenario(STARVED.nodes, seed, STARVED.loss, 1, True, STARVED.starved, STARVED.watch_s))
            for seed in range(2 if quick else 200)
        ]
        heals = {cut_s: pool.submit(heal_s, 1, cut_s) for cut_s in ((5.0, 60.0) if quick else (5.0, 60.0, 600.0))}
        joins = [pool.submit(join_s, seed) for seed in range(3 if quick else 30)]
        outcomes = {s: {n: [f.result() for f in futures] for n, futures in sizes.items()} for s, sizes in asked.items()}
        figures = {
            "kill_host_up": {str(nodes): told(found) for nodes, found in sorted(outcomes[False].items())},
            "silent": {str(nodes): told(found) for nodes, found in sorted(outcomes[True].items())},
            "starved": {"nodes=50 starved=10% loss=5%": told([future.result() for future in hungry])},
            "partition_heal_s": {f"{cut_s:g}": round(future.result(), 3) for cut_s, future in heals.items()},
            "join_100_s": {"max": round(max(f.result() for f in joins), 3), "runs": len(joins)},
            "bytes_per_node_s": {
                **{str(nodes): round(future.result().idle_bytes_node_s) for nodes, future in bytes_of.items()},
                "1000": round(outcomes[False][1000][0].idle_bytes_node_s),
            },
            "sim_10000_wall_s": None,
        }
    print(
        json.dumps(
            {
                "bench": "membership",
                "command": "python -m bench.membership" + (" --quick" if quick else ""),
                "machine": machine(),
                "took_s": round(time.perf_counter() - began_s, 1),
                "real": loopback,
                **figures,
            }
        )
    )


if __name__ == "__main__":
    main()
