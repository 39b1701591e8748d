"""`python -m tools.sim_storms --seeds 10000`: as many small meshes through as many storms, on all cores.

Exit code 1, and each seed with its blows, when something did not hold. `--first` picks where the seeds begin, so that a fault
found once is run again alone: `--first 4711 --seeds 1`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from membership.simulation.storm import FaultStorm

_SEEDS_AT_ONCE = 50


def outcome(seed: int) -> tuple[int, list[str], list[str]]:
    """The seed, what did not hold, and the blows of the storm."""
    storm = FaultStorm(seed)
    return seed, storm.faults(), storm.blows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many storms")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    asked = parser.parse_args()
    began_s = time.perf_counter()
    failed = 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        seeds = range(asked.first, asked.first + asked.seeds)
        for seed, faults, blows in pool.map(outcome, seeds, chunksize=min(_SEEDS_AT_ONCE, max(1, asked.seeds // 4))):
            if faults:
                failed += 1
                print(f"seed {seed}: {'; '.join(sorted(set(faults)))}\n  " + "\n  ".join(blows))
    print(f"{asked.seeds} storms, {failed} with a fault, {time.perf_counter() - began_s:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
