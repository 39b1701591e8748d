"""Three regions with an ocean between them: no false deaths, equal detection times, and little traffic between regions."""

from __future__ import annotations

import pytest

from membership.core import regions
from membership.simulation.checkers import all_see, converged, deaths_of, detection_s, percentile
from membership.simulation.network import Network
from mesh.ids import NodeId
from mesh.view import PeerState

SEEDS = range(3)
REGIONS = ("asia", "europe", "america")
FAR_S = (0.078, 0.084)  # one way: more than any real one between these


def spread_over_regions(seed: int, each: int, loss: float = 0.01, *, named: bool = True) -> tuple[Network, list[NodeId]]:
    """`each` nodes a region, all joined through the first. Not `named`: the nodes are as far apart and do not know it."""
    network = Network(seed, loss=loss, far_s=FAR_S)
    ids: list[NodeId] = []
    for number in range(3 * each):
        ids.append(network.add(ids[:1], region=REGIONS[number % 3] if named else ""))
        network.ways.place(ids[-1], REGIONS[number % 3])
    network.run(5)
    return network, ids


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mesh_over_three_regions_wrongs_nobody_and_finds_a_silent_death_in_time(seed: int) -> None:
    network, ids = spread_over_regions(seed, 8)
    network.run(20)
    assert deaths_of(network, ids) == [], f"seed {seed}"
    assert converged(network)
    victim, killed_at = ids[7], network.now
    network.kill(victim)
    network.run_until(lambda: all_see(network, victim, PeerState.DEAD), within_s=8.0)
    assert detection_s(network, victim, killed_at)[-1] < 8.0
    assert deaths_of(network, network.up) == [], f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_is_known_on_all_shores_within_a_second(seed: int) -> None:
    network, ids = spread_over_regions(seed, 8)
    killed_at = network.now
    network.crash(ids[10])
    network.run(3)
    took = detection_s(network, ids[10], killed_at)
    assert len(took) == 23 and took[-1] < 1.0, f"seed {seed}: {took}"
    assert deaths_of(network, network.up) == [], f"seed {seed}"


def test_a_quiet_mesh_sends_a_third_of_what_it_would_across_if_its_regions_had_no_names() -> None:
    across = {}
    for named in (True, False):
        network, _ = spread_over_regions(1, 12, loss=0.0, named=named)
        network.run(10)
        before, from_s = network.ways.bytes_abroad, network.now
        network.run(16)
        across[named] = (network.ways.bytes_abroad - before) / (network.now - from_s) / 36
    assert across[True] < across[False] / 3, across


@pytest.mark.parametrize("seed", SEEDS)
def test_a_region_that_is_lost_as_a_whole_is_found_dead_by_the_others_who_keep_one_another(seed: int) -> None:
    network, ids = spread_over_regions(seed, 8)
    lost = [node for node in ids if network.nodes[node].core.swim.myself.region == "asia"]
    for node in lost:
        network.kill(node)
    network.run_until(lambda: all(all_see(network, node, PeerState.DEAD) for node in lost), within_s=15.0)
    assert deaths_of(network, network.up) == [], f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cable_that_is_cut_for_a_minute_heals_when_it_is_mended(seed: int) -> None:
    network, ids = spread_over_regions(seed, 4)
    asia = [node for node in ids if network.nodes[node].core.swim.myself.region == "asia"]
    others = [node for node in ids if node not in asia]
    network.cut(asia, others)
    network.run(40)
    network.heal()
    network.run_until(lambda: converged(network), within_s=10)
    for _, by, node in deaths_of(network, ids):
        assert (by in asia) != (node in asia), f"seed {seed}: {by} took a neighbour for dead"


def test_estimates_tell_the_shores_apart_before_anything_was_measured() -> None:
    network, ids = spread_over_regions(1, 8)
    network.run(25)
    near: list[float] = []
    far: list[float] = []
    for node in ids:
        swim = network.nodes[node].core.swim
        for member in swim.members:
            if member.node != node and (estimate_s := swim.state.distances.estimate_s(member)) is not None:
                (near if member.region == swim.myself.region else far).append(estimate_s)
    assert percentile(sorted(near), 0.9) < 0.04 and percentile(sorted(far), 0.1) > 0.1
    newcomer = network.add(ids[:1], region="europe")
    network.run(4)  # five probes: two go abroad
    swim = network.nodes[newcomer].core.swim
    guessed = [m for m in swim.members if m.node != newcomer and m.rtt_s is None]
    received = {m.node: s for m in guessed if (s := swim.state.distances.estimate_s(m)) is not None}
    assert len(received) > 10 and {m.region for m in guessed if m.node in received} == set(REGIONS)
    for member in guessed:
        if member.node in received:
            assert (received[member.node] > 0.04) == (member.region != "europe"), (member.region, received[member.node])


def test_three_of_four_probes_stay_at_home_and_each_region_has_watchers_abroad() -> None:
    network, ids = spread_over_regions(1, 12)
    for region in REGIONS:
        of_it = [node for node in ids if network.nodes[node].core.swim.myself.region == region]
        for other in set(REGIONS) - {region}:
            watchers = [node for node in of_it if other in regions.watched(network.nodes[node].core.swim.members)]
            assert len(watchers) == regions.WATCHERS, (region, other)


def test_relays_are_asked_in_as_many_regions_as_there_are() -> None:
    network, ids = spread_over_regions(1, 6)
    swim = network.nodes[ids[0]].core.swim
    for _ in range(20):
        relays = regions.some_relays(swim.members, 3, network.rng, ids[3])
        assert {swim.members[relay].region for relay in relays} == set(REGIONS) and ids[3] not in relays
    received = [regions.some_gossip_peers(swim.members, 3, network.rng) for _ in range(20)]
    assert all(sorted(swim.members[node].region == "asia" for node in some) == [False, True, True] for some in received)
    assert all(len(set(some)) == 3 for some in received)


def test_a_lonely_node_of_a_region_watches_all_others_and_is_watched() -> None:
    network = Network(1, far_s=FAR_S)
    ids = [network.add(region="here")]
    ids += [network.add(ids[:1], region="here") for _ in range(5)]
    ids.append(network.add(ids[:1], region="far"))
    network.run(10)
    assert len([m for m in network.nodes[ids[-1]].core.swim.members if m.rtt_s is not None]) == 6
    network.kill(ids[-1])
    network.run_until(lambda: all_see(network, ids[-1], PeerState.DEAD), within_s=9.0)
