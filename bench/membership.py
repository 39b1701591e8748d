"""Measures detection times, their cost and false deaths of a mesh, in virtual time, and beside kinship on loopback.

`python -m bench.membership [--quick] [--only PARTS] [--seconds S] [--out FILE]`; the last line is one JSON object. False deaths
are unique (member, incarnation) pairs, with the rate that 95 % of repetitions would show more of. Quick leaves out 10,000 nodes
and takes few seeds: each part says its `runs`.
With `--out` whatever was measured stays in the file, also when the run is cut short, and the next one on the same commit goes on
from there: the simulations are the same on any machine, only their CPU seconds are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import processes
from bench.machine import machine
from bench.membership_figures import Came, figures
from bench.membership_runs import PARTS, asked

PEERS = Path("build/bench-peers/bin/python")
REAL_PROCESSES = 12
REAL_KILLS = 3
ALONE = ("real", "sim_10000_wall_s")  # measured while nothing else runs


def real() -> dict[str, Any]:
    """12 processes each, ours and kinship's, in one run on one machine."""
    ours = processes.measure([sys.executable, "-m", "bench.member"], REAL_PROCESSES, REAL_KILLS, settle_s=3.0)
    came: dict[str, Any] = {"ours": ours, "ours_every_node_p50_s": ours["every_node_p50_s"]}
    if not PEERS.exists():
        return came | {"kinship": None, "skipped": "kinship is not installed; run: make bench-peers"}
    theirs = processes.measure([str(PEERS), "bench/kinship_member.py"], REAL_PROCESSES, 1, settle_s=3.0)
    ratio = ours["every_node_p50_s"] / theirs["every_node_p50_s"]
    return came | {
        "kinship": theirs,
        "kinship_every_node_p50_s": theirs["every_node_p50_s"],
        "ratio": round(ratio, 4),
    }


class Record:
    """What has been measured, in memory and, if asked for, in a file that is whole at any time."""

    def __init__(self, quick: bool, path: Path | None) -> None:
        self._quick, self._path = quick, path
        self.runs = asked(quick)
        self.machine = machine()
        self.alone: dict[str, Any] = {}
        self.came: dict[str, Came] = {}
        self._kept_at = -1e9
        if path is not None and path.exists():
            before = json.loads(path.read_text())
            if before["machine"]["commit"] == self.machine["commit"] and before["quick"] == quick:
                self.alone, self.came = {part: before[part] for part in ALONE if part in before}, before["came"]
                print(f"goes on with {len(self.came)} runs of {path}", file=sys.stderr)

    def figures(self) -> dict[str, Any]:
        return {
            "bench": "membership",
            "command": "python -m bench.membership" + (" --quick" if self._quick else ""),
            "quick": self._quick,
            "machine": self.machine,
            **self.alone,
            **figures(self.runs, self.came),
            "simulated_cpu_s": round(sum(each["cpu_s"] for each in self.came.values()), 1),
            "simulations": {"made": len(self.came), "of": len(self.runs)},
        }

    def add(self, name: str, came: Came) -> None:
        self.came[name] = came
        if time.monotonic() - self._kept_at > 1.0:
            self.keep()

    def keep(self) -> None:
        if self._path is not None:
            aside = self._path.with_name(self._path.name + ".new")
            aside.write_text(json.dumps(self.figures() | {"came": self.came}))
            aside.replace(self._path)
            self._kept_at = time.monotonic()


def run_all(names: Iterable[str], cores: int, ends_at: float, done: Callable[[str, Came], None]) -> None:
    """Runs these in as many processes, and begins none after `ends_at`. `done` is called for one at a time."""
    waiting, taking = iter(names), threading.Lock()

    def following() -> str | None:
        with taking:
            return next(waiting, None) if time.monotonic() < ends_at else None

    def lead() -> None:
        command = [sys.executable, "-m", "bench.membership_runs"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            while (name := following()) is not None:
                process.stdin.write(name + "\n")
                process.stdin.flush()
                if not (line := process.stdout.readline()):
                    raise RuntimeError(f"the process that ran {name!r} ended")
                with taking:
                    done(name, json.loads(line))

    with ThreadPoolExecutor(cores) as pool:
        for led in [pool.submit(lead) for _ in range(cores)]:
            led.result()


def measure(record: Record, names: list[str], ends_at: float, cores: int) -> Mapping[str, float]:
    """Adds to the record what it lacks of these; wall seconds of each kind of work."""
    took_s: dict[str, float] = {}

    def timed(name: str, work: Callable[[], None]) -> None:
        began_s = time.monotonic()
        work()
        took_s[name] = round(time.monotonic() - began_s, 1)

    def loopback() -> None:
        record.alone["real"] = real()

    def large() -> None:
        def done(_: str, came: Came) -> None:
            record.alone["sim_10000_wall_s"] = round(came["s"], 1)
            record.alone["sim_10000_cpu_s"] = came["cpu_s"]

        run_all(["sim_10000_wall_s"], 1, ends_at, done)

    for name, work in (("real", loopback), ("sim_10000_wall_s", large)):
        if name in names and name not in record.alone:
            timed(name, work)
            record.keep()
    missing = [name for name in names if name not in ALONE and name not in record.came]
    timed("simulated", lambda: run_all(missing, cores, ends_at, record.add))
    record.keep()
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds: less than a minute on two cores")
    parser.add_argument("--only", metavar="PARTS", help=f"what begins with one of these, of {', '.join((*ALONE, *PARTS))}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--out", type=Path, help="keep what was measured here, and go on with what is there")
    given = parser.parse_args()
    began_s = time.monotonic()
    record = Record(given.quick, given.out)
    known = [*(ALONE[:1] if given.quick else ALONE), *(run.name for run in record.runs)]
    begun = tuple(given.only.split(",")) if given.only else ("",)
    if strange := [word for word in begun if not any(name.startswith(word) for name in known)]:
        parser.error(f"--only {','.join(strange)}: expected how one of these begins: {', '.join((*ALONE, *PARTS))}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    took_s = measure(record, [name for name in known if name.startswith(begun)], began_s + given.seconds, cores)
    print(json.dumps(record.figures() | {"took_s": round(time.monotonic() - began_s, 1), "parts_took_s": took_s}))


if __name__ == "__main__":
    main()
