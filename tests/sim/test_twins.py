"""Two live processes with one identity in a mesh: found within seconds, one gives way, and the mesh comes to rest."""

from __future__ import annotations

import pytest

from membership.simulation.network import Network
from mesh.ids import Address, NodeId
from mesh.view import PeerState

WITHIN_S = 5.0
SEEDS = range(5)


def addresses_seen(network: Network, identity: NodeId) -> set[tuple[Address, PeerState] | None]:
    """Where the others have this identity, and how it is to them; None: one does not know it."""
    found = set()
    for it in network.nodes.values():
        if it.running and it.core.me != identity:
            member = it.core.swim.members.peek(identity)
            found.add((member.address, member.state) if member is not None else None)
    return found


def at_rest(network: Network, identity: NodeId, runs: NodeId, quiet_s: float = 60.0) -> None:
    """All have the identity alive where `runs` is, and nothing is said about it any more."""
    wanted = {(network.nodes[runs].address, PeerState.ALIVE)}
    network.run_until(lambda: addresses_seen(network, identity) == wanted, within_s=WITHIN_S)
    before = len(network.seen)
    network.run(quiet_s)
    later = [seen for seen in network.seen[before:] if seen.node == identity]
    assert addresses_seen(network, identity) == wanted and not later, "no flapping"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_of_a_node_and_a_copy_of_its_data_directory_the_copy_stops(seed: int, loss: float) -> None:
    network = Network(seed, loss=loss)
    ids = network.grow(6)
    network.run(20.0)
    copy = network.add([ids[0]], epoch=2, twin_of=ids[3])
    network.run_until(lambda: not network.nodes[copy].running, within_s=WITHIN_S)
    assert network.nodes[ids[3]].running
    at_rest(network, ids[3], ids[3])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_that_lived_in_another_part_of_the_mesh_stops_when_the_parts_meet(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(8)
    here, there = ids[:4], ids[4:]
    network.cut(here, there)
    network.run(40.0)
    copy = network.add([there[0]], epoch=2, twin_of=ids[1])
    network.cut(here, [copy])
    network.run(40.0)
    assert network.nodes[ids[1]].running and network.nodes[copy].running
    network.heal()
    network.run_until(lambda: not network.nodes[copy].running, within_s=30.0)
    assert network.nodes[ids[1]].running
    at_rest(network, ids[1], ids[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_clones_that_start_together_one_stays(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(4)
    clones = [network.add([ids[0]])]
    clones.append(network.add([ids[1]], twin_of=clones[0]))
    identity = clones[0]
    network.run_until(lambda: sum(network.nodes[clone].running for clone in clones) == 1, within_s=WITHIN_S)
    [stays] = [clone for clone in clones if network.nodes[clone].running]
    at_rest(network, identity, stays)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_was_killed_and_starts_again_on_another_port_stays(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(5)
    for epoch in range(2, 6):
        network.crash(ids[2])
        network.add([ids[0]], number=2, epoch=epoch)
        at_rest(network, ids[2], ids[2], quiet_s=5.0)
        assert network.nodes[ids[2]].running


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("host_answers", [True, False])
def test_a_node_restored_from_an_old_disk_at_another_address_is_back_in_seconds(seed: int, host_answers: bool) -> None:
    """Its mesh remembers a later run than its disk does: that run is looked for where it was, and is not there."""
    network = Network(seed)
    ids = network.grow(5)
    network.add([ids[0]], number=2, epoch=9, address=("10.9.9.9", 1))
    network.run(5.0)
    (network.crash if host_answers else network.kill)(ids[2])
    network.add([ids[0]], number=2, epoch=3, address=("10.9.9.8", 1))
    at_rest(network, ids[2], ids[2], quiet_s=5.0)
    assert network.nodes[ids[2]].running and network.nodes[ids[2]].core.swim.myself.epoch > 9


@pytest.mark.parametrize("seed", SEEDS)
def test_another_node_at_the_address_of_a_former_run_is_no_twin(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(5)
    network.add([ids[0]], number=2, epoch=9)
    network.run(5.0)
    place = network.nodes[ids[2]].address
    network.crash(ids[2])
    network.add([ids[0]], number=2, epoch=3, address=("10.9.9.8", 1))
    network.add([ids[0]], address=place)
    at_rest(network, ids[2], ids[2], quiet_s=5.0)
