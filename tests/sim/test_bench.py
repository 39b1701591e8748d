"""What `bench.membership` makes of its simulations, and how it keeps them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from bench import membership
from bench.bounds import rate_bound
from bench.membership_figures import figures
from bench.membership_runs import Run, asked, heal_s


def came_of(run: Run) -> dict[str, Any]:
    death = {"node": "a", "first_s": 0.1, "p50_s": 0.2, "p99_s": 0.3, "last_s": 0.1 * (run.seed + 1), "passed_over_s": 0.2}
    match run.part:
        case "partition_heal_s" | "join_100_s":
            return {"s": None if run.seed == 1 else 0.5, "cpu_s": 1.0}
        case "bytes_per_node_s":
            return {"bytes_s": 230.4, "cpu_s": 1.0}
        case _:
            return {"deaths": [death | {"heard": 7, "observers": 8}], "false_deaths": run.seed, "unheard": 1, "cpu_s": 1.0}


@pytest.mark.parametrize(("events", "runs", "bound"), [(0, 1, 2.9957), (0, 200, 0.015), (1, 1, 4.7439), (36, 200, 0.2377)])
def test_the_bound_of_a_rate_is_the_one_that_so_few_events_are_seen_under_once_in_twenty(
    events: int, runs: int, bound: float
) -> None:
    assert rate_bound(events, runs) == pytest.approx(bound, abs=1e-4)
    mean = rate_bound(events, 1)
    assert sum(math.exp(-mean) * mean**count / math.factorial(count) for count in range(events + 1)) == pytest.approx(0.05)


def test_every_simulation_has_a_name_of_its_own_and_quick_ones_are_among_the_others_but_smaller() -> None:
    quick, full = asked(True), asked(False)
    assert len({run.name for run in full}) == len(full)
    assert {run.name for run in quick} <= {run.name for run in full}
    assert max(run.work for run in quick) < 30_000 < max(run.work for run in full)
    assert [run.work for run in full] == sorted((run.work for run in full), reverse=True)


def test_figures_tell_what_is_known_so_far_and_count_what_never_came() -> None:
    runs = asked(False)
    assert figures(runs, {}) == {}
    some = [run for run in runs if run.part in ("kill_host_up", "join_100_s", "bytes_per_node_s") and run.seed < 3]
    told = figures(runs, {run.name: came_of(run) for run in some})
    assert list(told) == ["kill_host_up", "join_100_s", "bytes_per_node_s"]
    assert list(told["kill_host_up"]) == ["8", "100", "1000", "10000"]
    eight = told["kill_host_up"]["8"]
    assert (eight["runs"], eight["false_deaths"], eight["unheard"], eight["every_node_p50_s"]) == (3, 3, 3, 0.2)
    assert told["join_100_s"] == {"p50": 0.5, "max": 0.5, "never": 1, "runs": 3, "within_1_s": 2}
    assert told["bytes_per_node_s"] == {"50": 230, "200": 230, "1000": 230}
    json.dumps(told, allow_nan=False)


def test_a_bench_that_was_cut_short_goes_on_from_its_file_on_the_same_commit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "membership.json"
    monkeypatch.setattr(membership, "machine", lambda: {"commit": "one"})
    record = membership.Record(True, path)
    run = record.runs[0]
    record.alone["real"] = {"ours_every_node_p50_s": 0.1}
    record.add(run.name, came_of(run))
    kept = json.loads(path.read_text())
    assert run.part in kept and kept["simulations"] == {"made": 1, "of": len(record.runs)}
    again = membership.Record(True, path)
    assert again.came == record.came and again.alone == record.alone
    assert membership.Record(False, path).came == {}
    monkeypatch.setattr(membership, "machine", lambda: {"commit": "two"})
    assert membership.Record(True, path).came == {}


def test_simulations_run_in_processes_of_their_own_that_end_with_the_bench_and_none_begins_too_late() -> None:
    came: dict[str, Any] = {}
    names = ["kill_host_up 8 seed 0", "kill_host_up 8 seed 1", "kill_host_up 8 seed 2"]
    membership.run_all(names, 2, math.inf, came.__setitem__)
    assert set(came) == set(names) and all(each["unheard"] == each["false_deaths"] == 0 < each["cpu_s"] for each in came.values())
    membership.run_all(["kill_host_up 8 seed 3"], 1, time.monotonic() - 1, came.__setitem__)
    assert len(came) == 3
    with pytest.raises(RuntimeError, match="no such run"):
        membership.run_all(["no such run"], 1, math.inf, came.__setitem__)


def test_a_mesh_that_does_not_heal_is_told_as_one_that_never_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.membership_runs.CUT_NODES", 4)
    monkeypatch.setattr("bench.membership_runs.GIVEN_UP_S", 1.0)
    assert heal_s(0, 1.0) is not None
    monkeypatch.setattr("bench.membership_runs.converged", lambda network: False)
    assert heal_s(0, 1.0) is None
