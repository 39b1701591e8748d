"""Prints how a simulated mesh finds dead members: `python -m tests.sim --seed N --nodes N --kill K`."""

from __future__ import annotations

import argparse
import time

from mesh.view import PeerState
from tests.sim.checkers import all_see, converged, deaths_of, detection_s, percentile
from tests.sim.network import Network


def main() -> int:
    """Exit status 0 when the mesh converged, nobody healthy was declared dead, and all heard of every death."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--kill", type=int, default=3, help="how many die without a word, one after the other")
    parser.add_argument("--loss", type=float, default=0.0, help="share of datagrams lost, 0 to 1")
    chosen = parser.parse_args()
    if chosen.nodes < 2 or not 0 <= chosen.kill < chosen.nodes or not 0 <= chosen.loss < 1:
        parser.error("expected at least 2 nodes, fewer kills than nodes, and a loss from 0 to below 1")

    started = time.perf_counter()
    network = Network(chosen.seed, loss=chosen.loss)
    first = network.add()
    ids = [first, *(network.add([first]) for _ in range(chosen.nodes - 1))]
    joined_s = network.run_until(lambda: converged(network), within_s=60)
    print(
        f"seed {chosen.seed}, {chosen.nodes} nodes, loss {chosen.loss:.1%}: all joined at once, one view after {joined_s:.2f} s"
    )

    before = sum(it.bytes_sent for it in network.nodes.values())
    network.run(20)
    idle = (sum(it.bytes_sent for it in network.nodes.values()) - before) / 20 / chosen.nodes
    print(f"idle: {idle:.0f} bytes/s sent a node")

    victims = network.rng.sample(ids, chosen.kill)
    times: list[float] = []
    unseen = 0
    if victims:
        print(f"{'killed':>18} {'first s':>8} {'p50 s':>8} {'p99 s':>8} {'last s':>8} {'heard by':>9}")
    for victim in victims:
        killed_at = network.now
        network.kill(victim)
        network.run(15)
        took = detection_s(network, victim, killed_at)
        times += took
        unseen += not all_see(network, victim, PeerState.DEAD)
        figures = " ".join(f"{percentile(took, share):8.2f}" for share in (0.0, 0.5, 0.99, 1.0))
        print(f"{victim:>18} {figures} {len(took):4d}/{len(network.up):<4d}")
    false_deaths = deaths_of(network, network.up)
    if times:
        times.sort()
        print(f"all observers: p50 {percentile(times, 0.5):.2f} s, p99 {percentile(times, 0.99):.2f} s, last {times[-1]:.2f} s")
    print(f"false deaths: {len(false_deaths)}; deaths not heard by everyone: {unseen}")
    print(f"trace {network.trace()}; {network.now:.0f} virtual seconds in {time.perf_counter() - started:.1f} s")
    return 0 if not false_deaths and not unseen else 1


if __name__ == "__main__":
    raise SystemExit(main())
