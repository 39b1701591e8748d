"""`mesh simulate` and what it is made of."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from cli.main import app
from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.simulation.scenario import Scenario, simulate
from membership.trace.recording import RecordedCore
from membership.trace.trace_format import Trace
from mesh.keys.signing import IdentityKey
from mesh.wire.gossip import Alive


@pytest.mark.parametrize("silent", [False, True])
def test_the_same_scenario_has_the_same_outcome_and_a_silent_death_takes_longer(silent: bool) -> None:
    one, again = (simulate(Scenario(12, seed=5, loss=0.01, kill=2, silent=silent)) for _ in range(2))
    assert (one.deaths, one.trace) == (again.deaths, again.trace)
    assert one.well and len(one.deaths) == 2
    assert all(death.passed_over_s < 3.0 and death.passed_over_s <= death.last_s for death in one.deaths)
    assert all((death.first_s > 1.0) is silent and death.last_s < 10 for death in one.deaths)


def test_starved_nodes_are_not_killed_by_a_mesh_that_knows_their_lag() -> None:
    assert simulate(Scenario(20, seed=2, loss=0.05, kill=0, starved=2)).well


def test_a_mesh_that_is_found_whole_is_as_one_that_joined() -> None:
    outcome = simulate(Scenario(201, seed=3, kill=1, watch_s=3.0))
    assert outcome.well and outcome.deaths[0].last_s < 0.5


def test_the_command_prints_a_table_or_json_and_says_by_its_exit_code_whether_all_was_well() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["simulate", "--nodes", "8", "--kill", "1"])
    assert shown.exit_code == 0 and "7/7" in shown.output and "SUSPECT S" in shown.output and "false deaths: 0" in shown.output
    received = json.loads(runner.invoke(app, ["simulate", "--nodes", "8", "--kill", "1", "--json"]).output)
    assert received["deaths"][0]["heard"] == 7 and received["false_deaths"] == 0
    assert runner.invoke(app, ["simulate", "--nodes", "3", "--kill", "3"]).exit_code == 1


def test_ten_thousand_nodes_may_be_asked_for_and_no_more_and_no_more_deaths_or_cuts_than_there_are_nodes_and_ways() -> None:
    runner = CliRunner()
    asked = runner.invoke(app, ["simulate", "--nodes", "10000", "--kill", "10000"])
    assert asked.exit_code == 1 and "fewer killed and starved nodes than 10000" in asked.stderr
    cut = runner.invoke(app, ["simulate", "--nodes", "5", "--kill", "1", "--starved", "1", "--one-way", "7"])
    assert cut.exit_code == 1 and "at most 6 cut ways" in cut.stderr
    refused = runner.invoke(app, ["simulate", "--nodes", "10001"])
    assert refused.exit_code == 2 and "10000" in refused.output


def test_whoever_waits_for_a_large_mesh_hears_of_each_death_as_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.simulate._LARGE", 9)
    runner = CliRunner()
    large, small = (runner.invoke(app, ["simulate", "--nodes", nodes, "--kill", "2", "--json"]) for nodes in ("9", "8"))
    assert large.stderr.count("8 of 8 know") == 1 and large.stderr.count("7 of 7 know") == 1 and small.stderr == ""
    assert [death["heard"] for death in json.loads(large.stdout)["deaths"]] == [8, 7]


def test_a_simulation_leaves_the_collector_of_cycles_as_it_found_it() -> None:
    before = gc.get_threshold()
    during: list[tuple[int, int, int]] = []
    simulate(Scenario(4, kill=1, watch_s=1.0), died=lambda death: during.append(gc.get_threshold()))
    assert gc.get_threshold() == before and during[0][0] > before[0]


def trace_of_a_node_whose_peer_falls_silent() -> bytes:
    """With the signatures of real nodes."""
    keys = [IdentityKey(bytes([number]) * 32) for number in (1, 2)]
    claims = [Alive(key.node, 1, 0, f"node-{number}", "127.0.0.1", 7000 + number) for number, key in enumerate(keys)]
    kept = Trace(2**20)
    core = RecordedCore(claims[0], keys[0], MembershipConfig(), Random(1), 100.0, kept)
    peer = MembershipCore(claims[1], keys[1], MembershipConfig(), Random(2), 100.0)
    core.learn(("127.0.0.1", 7001), peer.answer(core.me, core.ask(), 100.0)[0], 100.0)
    while core.deadline < 110:
        core.tick(core.deadline)
    return kept.dump()


def test_a_trace_of_a_real_node_is_replayed_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, path = CliRunner(), tmp_path / "membership.trace"
    path.write_bytes(trace_of_a_node_whose_peer_falls_silent())
    shown = runner.invoke(app, ["simulate", "--replay", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "node-1" in shown.output and "suspect" in shown.output and "timeout" in shown.output
    received = json.loads(runner.invoke(app, ["simulate", "--replay", str(path), "--json"]).output)
    assert received["exact"] and received["inputs"] == received["agreed"]
    assert [event["after"] for event in received["events"]] == ["alive", "suspect", "dead"]
    monkeypatch.setattr("membership.core.claims.minimum_s", lambda *given: 1.0)
    otherwise = runner.invoke(app, ["simulate", "--replay", str(path)])
    assert otherwise.exit_code == 1 and "answered otherwise" in otherwise.output


def test_what_is_no_trace_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("hello")
    for name in ("other", "missing"):
        refused = CliRunner().invoke(app, ["simulate", "--replay", str(tmp_path / name)])
        assert refused.exit_code != 0 and refused.exception is not None
