"""Many users at once: does the mesh bend under overload, and is it back at once when the load goes?

`python -m bench.load [--quick] [--out FILE]`; the last line is one JSON object. Three nodes hold the whole default model each;
the users (`bench.load_client`) are a process of their own and retry as the official SDK does: twice, obeying `Retry-After`.

closed: so many users, each asks again as soon as it is answered. Throughput counts tokens from five seconds after the start to
the moment from which no new request begins: neither the start nor the last users' waits are in it; `whole_run` has all.
open: requests arrive at a share of the capacity found with 200 users, at random, whatever is answered.
overtaken: requests of which the first token came more than a second after that of a request that was sent later.
loop_lag_p99_ms: the time that `GET /health` takes while the most users are there, an upper bound of the event loop's lag.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.load_client import Plan
from bench.machine import machine
from cli.load.report import percentile
from cli.local_mesh import LocalMesh, LocalNode

NODES = ("a", "b", "c")
START_S = 5.0
PROMPTS = 64  # of the run with a kill, so that each text can be compared
GOOD_TTFT_S = 10.0  # what counts as good in open loop
CLIENT_TIMEOUT_S = 900.0

Requests = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="32 and 200 users, short open loops: two minutes on two cores")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    with LocalMesh() as mesh:
        figures = measure(mesh, quick=options.quick)
    report = {
        "bench": "load",
        "command": f"python -m bench.load{' --quick' if options.quick else ''}",
        **figures,
        "isa": machine()["isa"],
        "machine": machine(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def measure(mesh: LocalMesh, *, quick: bool) -> dict[str, Any]:
    nodes = mesh.start_all({name: () for name in NODES})
    _wait_ready(nodes)
    rss_before = _rss_mib(nodes)
    users = {32: 300, 200: 600} if quick else {32: 600, 200: 1500, 1000: 4000, 2000: 6000}
    closed: dict[str, Any] = {}
    lag_ms: list[float] = []
    for count, requests in users.items():
        with _Probe(nodes) as probe:
            closed[str(count)] = _closed(nodes, Plan(urls_of(nodes), count, requests))
        lag_ms = probe.took_ms
        print(f"{count} users: {closed[str(count)]}", file=sys.stderr)
    rate = closed["200"]["request_throughput"]
    opened: dict[str, Any] = {}
    recovery_s = 0.0
    for share in (0.9, 3.0) if quick else (0.5, 0.9, 1.5, 3.0):
        seconds = 10.0 if quick else 30.0
        opened[f"{share:g}"] = _open(nodes, share, rate, seconds)
        if share == 3.0:
            recovery_s = opened["3"]["recovery_s"]
        print(f"{share:g} x capacity: {opened[f'{share:g}']}", file=sys.stderr)
    suspects = suspects_of(nodes)
    return {
        "nodes": len(nodes),
        "max_tokens": Plan([], 0, 0).max_tokens,
        "closed": closed,
        "open": opened,
        "recovery_s": recovery_s,
        "suspects": suspects,
        "loop_lag_p99_ms": round(percentile(lag_ms, 99), 1),
        "rss_mib": {"before": rss_before, "after": _rss_mib(nodes)},
        "with_kill": with_kill(mesh, nodes, 200 if quick else 1000),
    }


# --- runs


def _closed(nodes: Sequence[LocalNode], plan: Plan) -> dict[str, Any]:
    processes = [psutil.Process(node.pid) for node in nodes]
    before_s = _cpu_s(processes)
    seen = run_users(plan)
    cpu_s = _cpu_s(processes) - before_s
    return figures_of(seen["requests"], seen["seconds"], cpu_s, seen["cpu_s"], nodes=len(nodes))


def figures_of(requests: Requests, seconds: float, cpu_s: float, client_cpu_s: float, nodes: int) -> dict[str, Any]:
    """The figures of a closed loop. Times are in seconds since its start, CPU of all nodes together."""
    done = [request for request in requests if not request["error"]]
    first, last = START_S, max(request["due_at"] for request in requests)
    tokens = [at for request in done for at in request["tokens_at"]]
    steady = [at for at in tokens if first <= at <= last]
    ttft_ms = [1e3 * (request["tokens_at"][0] - request["due_at"]) for request in done if request["tokens_at"]]
    gaps = (zip(request["tokens_at"], request["tokens_at"][1:], strict=False) for request in done)
    itl_ms = [1e3 * (later - earlier) for pairs in gaps for earlier, later in pairs]
    return {
        "requests": len(requests),
        "success_rate": round(len(done) / len(requests), 5),
        "refused": sum(request["refused"] for request in requests),
        "failed": len(requests) - len(done),
        "errors": dict(Counter(request["error"][:160] for request in requests if request["error"]).most_common(5)),
        "output_throughput": round(len(steady) / (last - first), 1) if last > first else 0.0,
        "whole_run": {"seconds": round(seconds, 1), "output_throughput": round(len(tokens) / seconds, 1)},
        "request_throughput": round(sum(first <= request["ended_at"] <= last for request in done) / max(0.1, last - first), 2),
        "p50_ttft_ms": round(percentile(ttft_ms, 50), 1),
        "p99_ttft_ms": round(percentile(ttft_ms, 99), 1),
        "median_itl_ms": round(percentile(itl_ms, 50), 1),
        "p99_itl_ms": round(percentile(itl_ms, 99), 1),
        "cpu_s_a_request": round(cpu_s / max(1, len(done)), 4),
        "client_cpu_share": round(client_cpu_s / seconds, 3),
        "overtaken": overtaken(done),
        "share_of_nodes": [round(sum(r["node"] == node for r in done) / max(1, len(done)), 3) for node in range(nodes)],
    }


def overtaken(done: Requests) -> int:
    """Requests of which the first token came more than a second after that of one that was sent later."""
    answered = sorted((request for request in done if request["tokens_at"]), key=lambda request: request["accepted_at"])
    count, earliest = 0, float("inf")
    for request in reversed(answered):
        count += request["tokens_at"][0] - earliest > 1.0
        earliest = min(earliest, request["tokens_at"][0])
    return count


def _open(nodes: Sequence[LocalNode], share: float, capacity: float, seconds: float) -> dict[str, Any]:
    """Arrivals at `share` of `capacity` requests a second, then single requests until answers begin as before."""
    plan = Plan(urls_of(nodes), 0, 10**9, rate=share * capacity, seconds=seconds, retries=0)
    seen = run_users(plan)
    requests: Requests = seen["requests"]
    done = [request for request in requests if not request["error"]]
    good = [request for request in done if request["tokens_at"] and request["tokens_at"][0] - request["due_at"] <= GOOD_TTFT_S]
    begun_late = [request for request in good if request["due_at"] >= START_S]
    waits_s = [request["tokens_at"][0] - request["due_at"] for request in good]
    ended = max((request["tokens_at"][0] for request in done if request["tokens_at"]), default=seconds)
    return {
        "requests": len(requests),
        "offered": round(len(requests) / seconds, 1),
        "goodput_share": round(len(begun_late) / (seconds - START_S) / (min(1.0, share) * capacity), 3),
        "refused": sum(request["status"] in (429, 503) for request in requests),
        "failed": sum(bool(request["error"]) and request["status"] not in (429, 503) for request in requests),
        "p99_ttft_ms": round(1e3 * percentile(waits_s, 99), 1),
        "recovery_s": round(max(0.0, ended - seconds), 2),  # until the last that waited has its first token
    }


def with_kill(mesh: LocalMesh, nodes: list[LocalNode], users: int) -> dict[str, Any]:
    """Users while one of three nodes is killed and started again; their texts beside those of an undisturbed run."""
    plan = Plan(urls_of(nodes), 32, PROMPTS, prompts=PROMPTS)
    reference = {request["prompt"]: request["text"] for request in run_users(plan)["requests"] if not request["error"]}
    plan = Plan(urls_of(nodes), users, 3 * users, prompts=PROMPTS)
    seen: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: seen.update(run_users(plan)))
    thread.start()
    time.sleep(10.0)
    nodes[1].process.kill()
    nodes[1].process.wait()
    time.sleep(5.0)
    mesh.launch(NODES[1], "--http", nodes[1].http.removeprefix("http://"))
    thread.join()
    requests: Requests = seen["requests"]
    done = [request for request in requests if not request["error"]]
    cut = [request for request in requests if request["error"] and request["tokens_at"]]
    return {
        "users": users,
        "requests": len(requests),
        "success_rate": round(len(done) / len(requests), 5),
        "cut_with_their_entry": len(cut),  # streams whose client had tokens of the killed node: the SDK does not retry those
        "success_rate_without_those": round(len(done) / max(1, len(requests) - len(cut)), 5),
        "wrong_texts": sum(request["text"] != reference.get(request["prompt"]) for request in done),
        "errors": dict(Counter(request["error"][:160] for request in requests if request["error"]).most_common(5)),
    }


# --- parts


class _Probe:
    """Asks each node's `/health` ten times a second."""

    def __init__(self, nodes: Sequence[LocalNode]) -> None:
        self.took_ms: list[float] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(node.http,), daemon=True) for node in nodes]

    def __enter__(self) -> _Probe:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, url: str) -> None:
        with httpx.Client(timeout=30.0, trust_env=False) as client:
            while not self._over.wait(0.1):
                began = time.perf_counter()
                client.get(url + "/health")
                self.took_ms.append(1e3 * (time.perf_counter() - began))


def run_users(plan: Plan) -> dict[str, Any]:
    """Runs the users in a process of their own."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench.load_client"],
        input=json.dumps(asdict(plan)) + "\n",
        capture_output=True,
        text=True,
        timeout=CLIENT_TIMEOUT_S,
    )
    if ran.returncode:
        raise RuntimeError(f"the load client failed: {ran.stderr[-2000:]}")
    seen: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return seen


def urls_of(nodes: Sequence[LocalNode]) -> list[str]:
    return [node.http for node in nodes]


def _wait_ready(nodes: Sequence[LocalNode], within_s: float = 60.0) -> None:
    ends_at = time.monotonic() + within_s
    ready: Callable[[LocalNode], bool] = lambda node: httpx.get(node.http + "/ready", trust_env=False).status_code == 200  # noqa: E731
    while not all(map(ready, nodes)):
        if time.monotonic() > ends_at:
            raise TimeoutError(f"the nodes were not ready within {within_s:g} s")
        time.sleep(0.2)


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _rss_mib(nodes: Sequence[LocalNode]) -> float:
    return round(statistics.fmean(psutil.Process(node.pid).memory_info().rss for node in nodes) / 2**20, 1)


def suspects_of(nodes: Sequence[LocalNode]) -> int:
    """Members that any node suspected or thought dead, as its log has it."""
    states = ("state=suspect", "state=dead")
    return sum(
        line.count(state) for node in nodes for line in node.log.read_text(errors="replace").splitlines() for state in states
    )


if __name__ == "__main__":
    main()
