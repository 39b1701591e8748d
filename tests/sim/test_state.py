"""State of any size among many nodes: it reaches everybody through loss, cuts and churn, and small changes cost little."""

from __future__ import annotations

import pytest

from membership.simulation.network import Network
from mesh.ids import NodeId
from mesh.view import Facts
from mesh.wire.sync import MAX_OWNER_BYTES

LARGE = Facts(
    http="large", documents={f"store-{n}": {"0": "x" * 1000} for n in range(900)}
)  # nine tenths of what an owner may tell


def agree(network: Network) -> bool:
    """Every running node shows the facts that each running node publishes."""
    cores = [network.nodes[node].core for node in network.up]
    received = {core.me: core.peer(core.me) for core in cores}
    return all(
        (peer := core.peer(node)) is not None and own is not None and peer.facts == own.facts
        for core in cores
        for node, own in received.items()
    )


def knows(network: Network, node: NodeId, owner: NodeId, http: str) -> bool:
    peer = network.nodes[node].core.peer(owner)
    return peer is not None and peer.facts.http == http


@pytest.mark.parametrize("seed", range(1))
def test_a_large_map_and_small_news_both_get_through_a_tenth_of_the_nodes_churning(seed: int) -> None:
    network = Network(seed, loss=0.05)
    ids = network.grow(20)
    assert 0.8 * MAX_OWNER_BYTES < sum(map(len, map(str, LARGE.documents.values()))) < MAX_OWNER_BYTES
    network.publish(ids[0], LARGE)
    for step in range(12):  # two of twenty restart each second and forget everything, all the others publish
        for number in (1 + 2 * step % 18, 2 + 2 * step % 18):
            network.crash(ids[number])
            network.add([ids[19]], number=number, epoch=2 + step)
        for number in range(3, 20):
            network.publish(ids[number], Facts(http=f"{step}", documents={f"s{step % 4}": {"0": step}}))
        network.run(1.0)
        small = sum(knows(network, node, ids[19], f"{step}") for node in network.up)
        assert small >= 15, f"seed {seed}: only {small} of 20 heard news of a second ago at step {step}"
    network.run_until(lambda: agree(network), within_s=3)
    assert network.nodes[ids[7]].core.peer(ids[0]).facts == LARGE  # type: ignore[union-attr]


def test_one_key_changed_in_a_large_map_costs_a_small_part_of_it() -> None:
    network = Network(1)
    ids = network.grow(10)
    network.publish(ids[0], LARGE)
    network.run_until(lambda: agree(network), within_s=3)
    network.run(1)
    before = sum(it.bytes_sent for it in network.nodes.values())
    changed = Facts(http="large", documents=LARGE.documents | {"store-5": {"0": "y" * 1000}})
    network.publish(ids[0], changed)
    network.run_until(lambda: agree(network), within_s=1, step_s=0.01)
    spent = sum(it.bytes_sent for it in network.nodes.values()) - before
    assert spent < MAX_OWNER_BYTES / 10, f"{spent} bytes for one kilobyte at ten nodes"


@pytest.mark.parametrize("seed", range(3))
def test_both_sides_of_a_cut_agree_on_every_map_soon_after_it_heals(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(8)
    for node in ids:
        network.publish(node, Facts(http="before", documents={"gone": 1, "kept": 1}))
    network.run(1)
    network.cut(ids[:4], ids[4:])
    network.run(20)
    for node in ids:
        network.publish(node, Facts(documents={"kept": 2}))
    network.run(1)
    network.heal()
    network.run_until(lambda: agree(network), within_s=10)
    assert network.nodes[ids[0]].core.peer(ids[7]).facts == Facts(documents={"kept": 2})  # type: ignore[union-attr]
