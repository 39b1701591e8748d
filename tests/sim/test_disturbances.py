"""What `mesh simulate` does to a mesh besides killing: it happens, it is survived, and it is told apart from wrong verdicts."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import pytest
from typer.testing import CliRunner

from cli.main import app
from membership.core.swim import Swim
from membership.simulation.checkers import all_see, converged
from membership.simulation.disturbances import AWAY_S, Churn, Partition, cut_some_ways
from membership.simulation.network import Network
from membership.simulation.scenario import Scenario, _wronged, simulate
from mesh.view import PeerState
from mesh.wire.gossip import REFUSED, Dead, Gossip


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(12, seed=3, loss=0.02, kill=1, silent=True, churn_a_minute=120),
        Scenario(12, seed=4, loss=0.02, kill=1, one_way=12, partition_s=12),
        Scenario(12, seed=5, kill=1, silent=True, delay_ms=20, partition_s=4),
    ],
    ids=["churn", "one-way and partition", "delay and partition"],
)
def test_a_disturbed_mesh_hears_of_its_death_wrongs_nobody_and_is_one_again(scenario: Scenario) -> None:
    outcome = simulate(scenario)
    assert outcome.well, outcome
    assert (outcome.heal_s is not None) == bool(scenario.partition_s)
    assert (outcome.goings >= 15) == bool(scenario.churn_a_minute)


def test_churn_crashes_and_takes_leave_in_turn_and_all_come_back_as_another_run() -> None:
    network = Network(2)
    ids = network.grow(10)
    churn = Churn(network, ids[1:9], 120, Random(1))
    churn.run(11)
    assert churn.goings == 12 and {network.nodes[node].epoch for node in (ids[0], ids[9])} == {1}
    assert sum(network.nodes[node].epoch - 1 for node in ids[1:9]) == 12
    after = {seen.after for seen in network.seen if seen.node in ids[1:9]}
    assert {PeerState.LEFT, PeerState.DEAD} <= after
    network.run(AWAY_S)
    assert network.up and converged(network)


def test_a_churn_of_nothing_lets_time_pass_and_nothing_else() -> None:
    network = Network(2)
    ids = network.grow(3)
    began = network.now
    for churn in (Churn(network, ids, 0, Random(1)), Churn(network, [], 60, Random(1))):
        churn.run(7)
        assert churn.goings == 0
    assert network.now == began + 14 and network.up == ids


def test_ways_are_cut_in_one_direction_only_and_as_many_as_asked() -> None:
    network = Network(2)
    ids = network.grow(6)
    cut_some_ways(network, ids, 11, Random(3))
    closed = [(a, b) for a in ids for b in ids if a != b and not network.ways.passes(a, b)]
    assert len(closed) == 11
    network.heal()
    cut_some_ways(network, ids, 1000, Random(3))
    assert all(not network.ways.passes(a, b) for a in ids for b in ids if a != b) and network.ways.passes(ids[0], ids[0])


def test_what_one_half_says_of_the_other_is_excused_what_it_says_of_its_own_is_not() -> None:
    network = Network(2)
    ids = network.grow(4)
    partition = Partition(network)
    assert partition.excuses(network.now, ids[0], ids[3]) and partition.excuses(network.now, ids[2], ids[1])
    assert not partition.excuses(network.now, ids[0], ids[1]) and not partition.excuses(network.now - 1, ids[0], ids[3])
    network.run(20)
    assert all(network.state(ids[0], node) is PeerState.DEAD for node in ids[2:]) and not _wronged(network, partition)
    assert {node for node, _ in _wronged(network, None)} == set(ids)


def test_a_verdict_on_a_run_that_lives_is_false_and_one_on_a_run_that_ended_is_not() -> None:
    network = Network(2)
    ids = network.found(24)
    network.crash(ids[4])
    network.run_until(lambda: all_see(network, ids[4], PeerState.DEAD), within_s=2)
    network.add(ids[:1], number=4, epoch=2)
    network.run(1)
    assert not _wronged(network, None)
    by = network.nodes[ids[0]]
    for to in (network.nodes[node] for node in ids[1:] if ids[7] not in network.nodes[node].links and node != ids[7]):
        lie = Gossip(by.core.swim.state.sender(network.now), (Dead(ids[7], 1, 0, ids[0], REFUSED),))
        network.carry_out(to, to.core.receive(by.address, lie, network.now))
    assert _wronged(network, None) == {(ids[7], 0)}


def test_a_mesh_that_does_not_become_one_again_is_told_of_and_ends_the_command_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Swim, "_redial", lambda self, now: [])
    asked = ["simulate", "--nodes", "6", "--kill", "0", "--partition", "30"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 1 and "partition of 30 s: never" in shown.output


def test_the_command_takes_every_disturbance_and_tells_of_it() -> None:
    asked = {"nodes": 8, "kill": 1, "churn": 120, "partition": 3, "one-way": 4, "delay": 2, "starved": 1, "loss": 0.01}
    shown = CliRunner().invoke(app, ["simulate", *(f"--{option}={value}" for option, value in asked.items())])
    assert shown.exit_code == 0, shown.output
    assert "nodes went and came back" in shown.output and "one mesh again after a partition of 3 s: " in shown.output


def test_one_seed_is_one_trace_in_any_process() -> None:
    """Sets and dicts of strings come in another order there."""
    program = (
        "from membership.simulation.scenario import *; "
        "print(simulate(Scenario(8, 1, 0.05, 1, True, 1, 6.0, one_way=4, churn_a_minute=240, partition_s=4)).trace)"
    )
    received = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(received) == 1
