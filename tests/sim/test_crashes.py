"""Processes that are killed while their hosts stay up: the whole mesh knows in a fraction of a second, and of nobody else."""

from __future__ import annotations

import pytest

from membership.simulation.checkers import all_see, converged, deaths_of, detection_s
from membership.simulation.network import Network
from mesh.view import PeerState

SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [2, 3, 8, 12, 40])
def test_everybody_knows_of_a_crash_within_half_a_second_whatever_the_size(nodes: int, seed: int) -> None:
    network = Network(seed, loss=0.01)
    ids = network.grow(nodes)
    victim, killed_at = network.rng.choice(ids), network.now
    network.crash(victim)
    network.run(5)
    took = detection_s(network, victim, killed_at)
    assert len(took) == nodes - 1 and took[-1] < 0.5, f"seed {seed}: {took}"
    assert {s.cause for s in network.seen if s.after is PeerState.DEAD} == {"refused"}
    assert deaths_of(network, network.up) == [], f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rack_that_crashes_is_known_within_half_a_second_and_nobody_else_is_accused(seed: int) -> None:
    network = Network(seed, loss=0.01)
    ids = network.grow(30)
    victims, killed_at = network.rng.sample(ids, 10), network.now
    for victim in victims:
        network.crash(victim)
    network.run_until(lambda: all(all_see(network, victim, PeerState.DEAD) for victim in victims), within_s=0.6)
    network.run(10)
    assert deaths_of(network, network.up, killed_at) == [], f"seed {seed}"
    assert converged(network)


@pytest.mark.parametrize("seed", SEEDS)
def test_links_that_break_while_their_node_lives_kill_nobody(seed: int) -> None:
    network = Network(seed, loss=0.01)
    ids = network.grow(20)
    for _ in range(10):
        network.break_links(network.rng.choice(ids))
        network.run(1.5)
    network.run(5)
    assert deaths_of(network, ids) == [], f"seed {seed}"
    assert converged(network)
    assert all(len(it.links) >= 8 for it in network.nodes.values()), "links that broke are made again"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_restarted_on_the_spot_is_back_everywhere_in_a_second(seed: int) -> None:
    network = Network(seed, loss=0.01)
    ids = network.grow(12)
    for number in (3, 7):
        network.crash(ids[number])
        network.run(0.004)
        network.add([ids[0]], number=number, epoch=2)
    network.run_until(lambda: converged(network), within_s=1.0)
    network.run(20)
    assert converged(network)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rolling_restart_of_all_ends_in_one_view_with_nobody_dead(seed: int) -> None:
    network = Network(seed, loss=0.01)
    ids = network.grow(10)
    for number in range(10):
        network.leave(ids[number])
        network.run(0.3)
        network.add([ids[(number + 1) % 10]], number=number, epoch=2)
        network.run(0.3)
    network.run_until(lambda: converged(network), within_s=2.0)
    assert deaths_of(network, ids) == [], f"seed {seed}: who leaves is never dead"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_during_a_sleep_of_others_is_learnt_when_they_wake(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(10)
    sleepers = ids[2:5]
    for sleeper in sleepers:
        network.pause(sleeper)
    network.crash(ids[8])
    network.run(1.0)
    for sleeper in sleepers:
        network.resume(sleeper)
    network.run_until(lambda: all_see(network, ids[8], PeerState.DEAD), within_s=4)
    network.run(5)
    assert deaths_of(network, network.up) == [], f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_firewall_that_resets_the_links_of_a_node_kills_it_for_no_longer_than_datagrams_are_lost_too(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(20)
    victim = network.rng.choice(ids)
    others = [node for node in ids if node != victim]
    network.nodes[victim].refuses_all = True
    network.break_links(victim)
    network.run(5)
    assert deaths_of(network, ids) == [], f"seed {seed}: it still answers pings"
    network.break_links(victim)
    network.run(5)
    network.break_links(victim)
    network.cut([victim], others, one_way=True)
    network.run(1.0)
    network.heal()
    network.nodes[victim].refuses_all = False
    network.run_until(lambda: converged(network), within_s=5)
    assert {node for _, _, node in deaths_of(network, ids)} <= {victim}
