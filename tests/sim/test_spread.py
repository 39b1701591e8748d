"""Joins, splits and facts: all nodes converge soon, and equally for equal seeds."""

from __future__ import annotations

import pytest

from membership.simulation.checkers import all_see, converged, deaths_of
from membership.simulation.network import Network
from mesh.view import Facts, PeerState

SEEDS = range(5)


def facts_everywhere(network: Network, owner: int, http: str) -> bool:
    ids = list(network.nodes)
    cores = [network.nodes[node].core for node in network.up]
    return all((peer := core.peer(ids[owner])) is not None and peer.facts.http == http for core in cores)


@pytest.mark.parametrize("seed", SEEDS)
def test_fifty_nodes_that_join_at_once_have_one_view_within_a_second(seed: int) -> None:
    network = Network(seed)
    first = network.add()
    for _ in range(49):
        network.add([first])
    took_s = network.run_until(lambda: converged(network), within_s=1.5)
    assert took_s < 1.5
    assert deaths_of(network, network.up) == [], f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cut_for_s", [1.0, 4.0, 60.0])
def test_a_partition_of_any_length_heals_by_itself(seed: int, cut_for_s: float) -> None:
    network = Network(seed)
    ids = network.grow(12)
    network.cut(ids[:5], ids[5:])
    network.run(cut_for_s)
    if cut_for_s > 30:
        assert all(network.state(by, node) is PeerState.DEAD for by in ids[:5] for node in ids[5:])
    healed_at = network.now
    network.heal()
    network.run_until(lambda: converged(network), within_s=10)
    for at, by, node in deaths_of(network, ids, healed_at):
        across = (by in ids[:5]) != (node in ids[:5])
        assert across and cut_for_s < 10, f"seed {seed}: {by} took {node} of its own side for dead at {at}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_link_that_works_one_way_only_kills_nobody(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(10)
    network.cut([ids[2]], [ids[6]], one_way=True)
    network.run(40)
    assert deaths_of(network, ids) == [], f"seed {seed}: three relays can reach it"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_nobody_can_reach_is_dead_to_all_and_comes_back(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(10)
    others = [node for node in ids if node != ids[4]]
    network.cut(others, [ids[4]])
    network.run_until(lambda: all(network.state(by, ids[4]) is PeerState.DEAD for by in others), within_s=10)
    network.run(20)
    network.heal()
    network.run_until(lambda: converged(network), within_s=10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [2, 8, 30])
def test_facts_reach_everybody_within_a_probe_period_and_most_within_milliseconds(nodes: int, seed: int) -> None:
    network = Network(seed)
    ids = network.grow(nodes)
    published_at = network.now
    network.publish(ids[1], Facts(http="http://here", version="1"))
    network.run_until(lambda: facts_everywhere(network, 1, "http://here"), within_s=1.5, step_s=0.01)
    soon = {by for at, by, owner in network.facts_seen if owner == ids[1] and at < published_at + 0.05}
    assert len(soon) >= 0.5 * nodes, f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_facts_larger_than_any_datagram_arrive_and_die_with_their_run(seed: int) -> None:
    network = Network(seed, loss=0.2)
    ids = network.grow(6)
    big = Facts(http="http://old", documents={"digest": "x" * 20_000})
    network.publish(ids[3], big)
    network.run_until(lambda: facts_everywhere(network, 3, "http://old"), within_s=3)
    network.add([ids[0]], number=3, epoch=2)
    network.run_until(lambda: converged(network), within_s=5)
    assert facts_everywhere(network, 3, ""), "a restarted node serves nothing until it says so"


@pytest.mark.parametrize("seed", SEEDS)
def test_two_meshes_become_one_when_a_node_of_one_joins_the_other(seed: int) -> None:
    network = Network(seed)
    left = network.grow(6)
    right_first = network.add()
    right = [right_first, *(network.add([right_first]) for _ in range(5))]
    network.run(3)
    assert network.state(left[2], right[2]) is None
    network.nodes[right[4]].core.swim.remember_seed(network.nodes[left[1]].address)
    network.run_until(lambda: converged(network), within_s=12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_that_starts_later_is_found(seed: int) -> None:
    network = Network(seed)
    seed_node = network.add()
    network.kill(seed_node)
    others = [network.add([seed_node]) for _ in range(3)]
    network.run(10)
    assert all(network.state(others[0], node) is None for node in others[1:])
    it = network.nodes[seed_node]
    it.running = True
    network.run_until(lambda: converged(network), within_s=10)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mesh_whose_nodes_all_restarted_without_a_seed_finds_itself_by_old_addresses(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(8)
    old = [network.nodes[node].address for node in ids]
    for node in ids:
        network.crash(node)
    network.run(1)
    for number in range(8):
        network.add(number=number, epoch=2, address=old[number])
        for address in old:
            network.nodes[ids[number]].core.swim.remember_seed(address)
    network.run_until(lambda: converged(network), within_s=10)


def test_the_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    def trace(seed: int) -> str:
        network = Network(seed, loss=0.1)
        ids = network.grow(10)
        network.kill(ids[3])
        network.run(10)
        assert all_see(network, ids[3], PeerState.DEAD)
        return network.trace()

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


def test_no_datagram_is_ever_longer_than_its_limit_even_in_a_crowd_of_long_names() -> None:
    network = Network(3)
    first = network.add(name="n" * 32)
    for _ in range(35):
        network.add([first], name="m" * 32)
    network.run(3)
    assert network.largest_bytes > 1200, "the crowd fills datagrams, or this shows nothing"
    assert converged(network)
