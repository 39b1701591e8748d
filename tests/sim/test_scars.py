"""Bugs that others had, each with the test that keeps it from us. What is not here is in the named files.

| bug | test |
|---|---|
| kinship KP-01: a replay floor shuts restarted seeds out | test_seeds_that_restart_together_open_one_anothers_datagrams |
| kinship KP-02: leavers spend their words on other leavers | test_those_who_leave_together_are_never_called_dead |
| kinship KP-03: an own claim that fits no datagram | test_an_own_claim_that_could_never_spread_is_refused_at_once |
| kinship KP-04, memberlist: a stale suspicion is not refuted | test_a_stale_suspicion_is_refuted_and_kills_nobody |
| kinship KP-05, memberlist: an exchange counts as a witness | test_an_exchange_is_no_independent_confirmation |
| consul 1212, 916, 5567: a slow node accuses all | test_starved_nodes_are_not_killed_by_a_mesh_that_knows_their_lag |
| consul 5928: one half-detached node storms | test_a_node_that_hears_half_of_the_mesh_kills_nobody_else |
| consul 2430: two nodes at one address | test_two_nodes_at_one_address_cost_nobody_else_anything |
| weaviate 10698, serf 605, ringpop 42: no heal | test_a_partition_of_any_length_heals_by_itself |
| memberlist 311: restarted without memory, stays dead | test_a_node_restarted_without_its_memory_is_back_in_seconds |
| memberlist PR 345: a stale Alive gets no answer | test_a_dead_member_that_sends_gets_a_correction |
| memberlist PR 345: deaths of strangers are lost | test_an_exchange_brings_the_dead_with_their_age_so_that_ghosts_end |
| al8n 197: a stale Alive resurrects | test_an_old_word_of_the_dead_does_not_raise_them |
| consul 3217: a foreign version poisons the mesh | test_strangers_garbage_and_other_keys_are_dropped_and_counted |
| memberlist 253: who left is kept for ever | test_the_departed_are_forgotten_everywhere_in_the_end |
| serf 333: only the living on disk | test_a_restarted_node_knows_the_living_and_the_dead_but_not_itself_nor_who_left |
| piko 314, chitchat 114, mesh-llm 405, 417, 1970: ghosts | test_one_that_slept_through_a_death_brings_no_ghost_back |
| mesh-llm 242: a death by hearsay is believed unprobed | test_a_lie_about_a_death_kills_nobody |
| mesh-llm 106: a round trip timed through a relay | test_an_answer_through_a_relay_times_nothing_and_a_later_direct_one_does |
| mesh-llm 417: round trips of 0 ms | test_an_ack_that_took_no_time_is_no_measurement |
| consul 733: a new name, address | test_a_restart_with_a_higher_epoch_supersedes_the_dead_run_and_the_live_one |
| memberlist 299: facts starve in churn | test_facts_reach_everybody_while_nodes_come_and_go |
| memberlist 191, alertmanager 1412: what no datagram holds | test_facts_larger_than_any_datagram_arrive_and_die_with_their_run |
| memberlist 348, cortex 4326: from 127 members malformed | test_a_mesh_of_more_than_127_joins_within_its_datagrams |
| memberlist 243, serf 1062: queues without bound | test_invariants_hold_under_kills_sleeps_loss_and_restarts |
| memberlist 264: TCP dead | test_a_firewall_that_resets_the_links_of_a_node_kills_it_for_no_longer_than_datagrams_are_lost_too |
| memberlist PR 242: an interface down is never noticed | test_a_node_nobody_can_reach_is_dead_to_all_and_comes_back |
| consul 4074: two meshes become one | test_the_cluster_is_authenticated_beyond_its_short_hash |
| consul 719, 1299: traps of key rings | test_keys_rotate_without_a_gap |
| foca 2: a late answer to an older probe | test_a_relayed_ack_saves_the_target_and_a_late_or_foreign_one_changes_nothing |
| foca 25: two runs of one identity outbid one another | test_two_copies_of_one_node_do_not_outbid_one_another_without_end |
| foca 26: timers that fire late, or out of order | test_after_any_input_a_tick_uses_its_deadline_up_and_bounds_hold |
| foca 34: one's own former run | test_a_later_run_of_this_node_makes_it_count_as_a_still_later_one |
| foca 35: what does not decode | test_the_decoder_and_the_core_survive_mutations_of_the_corpus |
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from membership.core.config import MembershipConfig
from membership.simulation.checkers import all_see, converged, deaths_of
from membership.simulation.network import Network
from mesh.ids import NodeId
from mesh.keys.seal import KeySeal
from mesh.view import Facts, PeerState
from mesh.wire.gossip import REFUSED, TIMEOUT, Dead, Gossip, Suspect
from tests.membership.pieces import alive, gossip, node_among

SEEDS = range(3)


def test_every_bug_in_the_table_has_its_test() -> None:
    table = re.findall(r"\| (test_\w+) \|", __doc__ or "")
    tests = Path(__file__).parent.parent
    written = {name for path in tests.rglob("test_*.py") for name in re.findall(r"def (test_\w+)\(", path.read_text())}
    assert len(table) >= 34 and set(table) <= written, set(table) - written


def tell(network: Network, to: NodeId, by: NodeId, *claims: Suspect | Dead) -> None:
    """Sends these claims from `by` to `to`, with or without reason."""
    it, teller = network.nodes[to], network.nodes[by]
    claimed = Gossip(teller.core.swim.state.sender(network.now), claims)
    network.carry_out(it, it.core.receive(teller.address, claimed, network.now))


def test_seeds_that_restart_together_open_one_anothers_datagrams() -> None:
    before = [KeySeal([b"k" * 32]) for _ in range(2)]
    for _ in range(1000):
        before[1].open(before[0].seal(b"long ago"))
    after = [KeySeal([b"k" * 32]) for _ in range(2)]
    for one, other in ((after[0], after[1]), (after[1], after[0]), (after[0], before[1])):
        assert other.open(one.seal(b"hello")) == b"hello"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stale_suspicion_is_refuted_and_kills_nobody(seed: int) -> None:
    """The accuser missed the refutation, so it accuses an incarnation that is past: the accused answers all the same."""
    network = Network(seed)
    accused, accuser = network.grow(2)
    network.cut([accused], [accuser])
    tell(network, accused, accuser, Suspect(accused, 1, 0, accuser))
    assert network.nodes[accused].core.swim.myself.incarnation == 1
    assert network.nodes[accuser].core.swim.members[accused].incarnation == 0
    network.run(0.05)
    network.heal()
    tell(network, accuser, accused, Suspect(accused, 1, 0, accuser))
    assert network.state(accuser, accused) is PeerState.SUSPECT
    network.run_until(lambda: converged(network), within_s=1.5)
    network.run(10)
    assert deaths_of(network, network.up) == [] and network.nodes[accused].core.swim.myself.incarnation == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_hears_half_of_the_mesh_kills_nobody_else(seed: int) -> None:
    network = Network(seed, loss=0.02)
    ids = network.grow(16)
    network.cut(ids[1:9], [ids[0]], one_way=True)
    network.run(40)
    assert {node for _, _, node in deaths_of(network, ids)} <= {ids[0]}, f"seed {seed}"
    network.heal()
    network.run_until(lambda: converged(network), within_s=10)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_nodes_at_one_address_cost_nobody_else_anything(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(12)
    usurper = network.add(ids[:1], address=network.nodes[ids[5]].address)
    network.run(40)
    assert {node for _, _, node in deaths_of(network, [*ids, usurper])} <= {ids[5], usurper}, f"seed {seed}"
    assert all(network.state(by, usurper) is PeerState.ALIVE for by in ids if by != ids[5])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_restarted_without_its_memory_is_back_in_seconds(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(10)
    for epoch in (2, 3):
        network.add(ids[:1], number=4, epoch=epoch)
        network.run(2)
    network.crash(ids[4])
    network.run_until(lambda: all_see(network, ids[4], PeerState.DEAD), within_s=2)
    network.add(ids[:1], number=4, epoch=1)
    network.run_until(lambda: converged(network), within_s=3)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_old_word_of_the_dead_does_not_raise_them(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(10)
    old = network.nodes[ids[3]].core.swim.myself.alive_claim()
    network.crash(ids[3])
    network.run_until(lambda: all_see(network, ids[3], PeerState.DEAD), within_s=2)
    for by in ids[4:]:
        it = network.nodes[by]
        claimed = Gossip(network.nodes[ids[0]].core.swim.state.sender(network.now), (old,))
        network.carry_out(it, it.core.receive(network.nodes[ids[0]].address, claimed, network.now))
    network.run(5)
    assert all_see(network, ids[3], PeerState.DEAD), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_one_that_slept_through_a_death_brings_no_ghost_back(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(10)
    network.pause(ids[1])
    network.crash(ids[6])
    network.run(20)
    network.resume(ids[1])
    woken_at = network.now
    network.run(20)
    assert all_see(network, ids[6], PeerState.DEAD)
    risen = [s for s in network.seen if s.node == ids[6] and s.at >= woken_at and s.after is PeerState.ALIVE]
    assert risen == [], f"seed {seed}"


@pytest.mark.parametrize("cause", [TIMEOUT, REFUSED])
def test_a_lie_about_a_death_kills_nobody(cause: str) -> None:
    """A silent death by hearsay is a suspicion; a refused one is believed only by those who hold no link, until it speaks."""
    network = Network(1)
    ids = network.grow(12)
    for by in ids[1:11]:
        tell(network, by, ids[0], Dead(ids[11], 1, 0, ids[0], cause))
    network.run_until(lambda: converged(network), within_s=2)
    died = {by for _, by, _ in deaths_of(network, [ids[11]])}
    linked = {by for by in ids if ids[11] in network.nodes[by].links}
    assert not died if cause == TIMEOUT else not died & linked


@pytest.mark.parametrize("seed", SEEDS)
def test_the_departed_are_forgotten_everywhere_in_the_end(seed: int) -> None:
    network = Network(seed, config=MembershipConfig(forget_s=5.0))
    ids = network.grow(8)
    for leaver in ids[5:]:
        network.leave(leaver)
    network.run(20)
    assert all(set(m.node for m in network.nodes[by].core.swim.members) == set(ids[:5]) for by in ids[:5]), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_facts_reach_everybody_while_nodes_come_and_go(seed: int) -> None:
    network = Network(seed)
    ids = network.grow(20)
    for step in range(8):
        number = 10 + step
        network.crash(ids[number])
        network.run(0.15)
        network.publish(ids[1], Facts(http=f"http://step-{step}"))
        network.add([ids[0]], number=number, epoch=2)
        network.run(0.15)
    network.run(0.7)
    received = [(peer := network.nodes[by].core.peer(ids[1])) is not None and peer.facts.http for by in network.up]
    assert set(received) == {"http://step-7"}, f"seed {seed}: {received}"


def test_a_mesh_of_more_than_127_joins_within_its_datagrams() -> None:
    network = Network(1)
    ids = network.found(110)
    for _ in range(20):
        network.add(ids[:1])
    network.run(0.1)
    network.run_until(lambda: len(network.up) == 130 and converged(network), within_s=3)
    assert 1300 < network.largest_bytes <= 1400, "full ones were sent, and none too long"


def test_two_copies_of_one_node_do_not_outbid_one_another_without_end() -> None:
    one, copy = node_among(2), node_among(2)
    for step in range(1000):  # ten seconds
        now = step * 0.01
        for core, other in ((one, copy), (copy, one)):
            core.receive(("10.0.0.1", 7001), gossip(1, other.swim.myself.alive_claim()), now)
    assert max(one.swim.myself.epoch, copy.swim.myself.epoch) <= 1 + 2 * 10 / one.config.probe_period_s
    assert alive(0).node == one.me
