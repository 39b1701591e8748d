"""`mesh simulate` and what it is made of."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cli.main import app
from membership.simulation.scenario import Scenario, simulate


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
    assert shown.exit_code == 0 and "7/7" in shown.output and "false deaths: 0" in shown.output
    told = json.loads(runner.invoke(app, ["simulate", "--nodes", "8", "--kill", "1", "--json"]).output)
    assert told["deaths"][0]["heard"] == 7 and told["false_deaths"] == 0
    assert runner.invoke(app, ["simulate", "--nodes", "3", "--kill", "3"]).exit_code == 1
