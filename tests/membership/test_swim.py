"""One node's failure detector, message by message."""

from __future__ import annotations

import math

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import EpochRenewed, FactsChanged, LoadMeasured, MemberChanged, MemberForgotten, PushFacts, StartSync
from mesh.view import Facts, Load, PeerState
from mesh.wire.gossip import Ack, Dead, Gossip, Ping, PingReq, Sender, Suspect
from mesh.wire.sync import Synced
from tests.membership.pieces import (
    CONFIG,
    ME,
    address_of,
    alive,
    gossip,
    left,
    messages,
    node_among,
    only,
    peer_id,
    run_to,
    sender,
    state,
)


def test_a_ping_is_acknowledged_to_where_it_came_from() -> None:
    core = node_among(3)
    effects = core.receive(("10.9.9.9", 1), Ping(sender(1), 7, ME), 1.0)
    [(to, ack)] = messages(effects, Ack)
    assert (to, ack.seq, ack.sender.node) == (("10.9.9.9", 1), 7, ME)


def test_a_ping_for_the_former_node_of_an_address_gets_this_nodes_claim() -> None:
    core = node_among(3)
    effects = core.receive(address_of(1), Ping(sender(1), 7, peer_id(9)), 1.0)
    assert messages(effects, Ack) == []
    [(_, received)] = messages(effects, Gossip)
    assert received.claims[0] == alive(0)


def test_every_peer_is_probed_once_a_round() -> None:
    core = node_among(5)
    effects = run_to(core, 10 * CONFIG.probe_period_s, answers=True)
    assert {ping.target for _, ping in messages(effects, Ping)} == {peer_id(n) for n in range(1, 6)}
    assert all(state(core, n) is PeerState.ALIVE for n in range(1, 6))


def test_a_silent_peer_is_probed_through_others_then_suspected_then_dead() -> None:
    core = node_among(2)
    effects = run_to(core, 0.95)  # one whole probe
    [(_, ping), *_] = messages(effects, Ping)
    asked = messages(effects, PingReq)
    assert [request.target for _, request in asked][:1] == [ping.target]
    silent = int(ping.target, 16)
    run_to(core, 1.0)
    assert state(core, silent) is PeerState.SUSPECT
    run_to(core, 8.0)
    assert state(core, silent) is PeerState.DEAD


def test_a_relayed_ack_saves_the_target_and_a_late_or_foreign_one_changes_nothing() -> None:
    core = node_among(3)
    effects = run_to(core, core.deadline)
    sent_at = core.swim.probes.under_way[messages(effects, Ping)[0][1].seq].sent_at
    [(_, ping)] = messages(effects, Ping)
    target = int(ping.target, 16)
    effects = run_to(core, sent_at + CONFIG.probe_timeout_s)
    relays = [number for number in range(1, 4) if number != target]
    assert {to for to, _ in messages(effects, PingReq)} == {address_of(number) for number in relays}
    stranger = Sender(peer_id(9), 1, 0, 0)
    core.receive(("10.9.9.9", 9), Ack(stranger, ping.seq), sent_at + 0.3)
    core.receive(address_of(relays[0]), Ack(sender(relays[0]), ping.seq + 1), sent_at + 0.3)
    assert core.swim.probes.probing(ping.target), "neither may answer this probe"
    core.receive(address_of(relays[0]), Ack(sender(relays[0]), ping.seq), sent_at + 0.3)
    assert not core.swim.probes.probing(ping.target)
    run_to(core, sent_at + CONFIG.probe_period_s)
    assert state(core, target) is PeerState.ALIVE


def test_a_relayed_ping_goes_to_members_only_and_its_ack_to_the_asker() -> None:
    core = node_among(2)
    effects = core.receive(address_of(1), PingReq(sender(1), 77, peer_id(2)), 1.0)
    [(to, ping)] = messages(effects, Ping)
    assert to == address_of(2)
    effects = core.receive(address_of(2), Ack(sender(2), ping.seq), 1.01)
    [(back, ack)] = messages(effects, Ack)
    assert (back, ack.seq) == (address_of(1), 77)
    assert messages(core.receive(address_of(2), Ack(sender(2), ping.seq), 1.02), Ack) == [], "once"
    assert messages(core.receive(address_of(1), PingReq(sender(1), 78, peer_id(9)), 1.0), Ping) == []


def test_a_direct_ack_measures_the_round_trip_and_brings_the_load() -> None:
    core = node_among(1)
    effects = run_to(core, core.deadline)
    [(_, ping)] = messages(effects, Ping)
    sent_at = core.swim.probes.under_way[ping.seq].sent_at
    by = Sender(peer_id(1), 1, 0, 0, Load(running=3), 40)
    [measured] = only(LoadMeasured, core.receive(address_of(1), Ack(by, ping.seq), sent_at + 0.004))
    assert measured.load == Load(running=3)
    assert math.isclose(measured.load_at, sent_at + 0.004 - 0.04)
    assert measured.rtt_s is not None and math.isclose(measured.rtt_s, 0.004, abs_tol=1e-9)


def test_an_older_load_does_not_replace_a_newer_one() -> None:
    core = node_among(1)
    core.receive(address_of(1), Gossip(Sender(peer_id(1), 1, 0, 0, Load(running=3), 0)), 5.0)
    core.receive(address_of(1), Gossip(Sender(peer_id(1), 1, 0, 0, Load(running=9), 2000)), 5.1)
    peer = core.peer(peer_id(1))
    assert peer is not None and peer.load == Load(running=3)


def test_the_accused_refutes_with_a_higher_incarnation_to_its_accuser_at_once() -> None:
    core = node_among(3)
    accusation = Suspect(ME, 1, 0, peer_id(2))
    effects = core.receive(address_of(1), Ping(sender(1), 5, ME, (accusation,)), 1.0)
    [(_, ack)] = messages(effects, Ack)
    assert ack.claims[0] == alive(0, incarnation=1)
    assert ack.sender.incarnation == 1


def refutes(core: MembershipCore, times: int) -> None:
    for incarnation in range(times):
        core.receive(address_of(1), gossip(1, Dead(ME, 1, incarnation, peer_id(2))), 1.0)


def test_one_that_slept_and_learns_that_it_is_dead_lives_on_with_a_higher_incarnation() -> None:
    core = node_among(3)
    effects = core.receive(address_of(1), gossip(1, Dead(ME, 1, 0, peer_id(2))), 1.0)
    assert core.swim.myself.incarnation == 1
    assert (address_of(1), alive(0, incarnation=1)) in [(to, received.claims[0]) for to, received in messages(effects, Gossip)]
    assert only(MemberChanged, effects) == [MemberChanged(ME, PeerState.ALIVE, PeerState.ALIVE)]


def test_a_stale_accusation_is_answered_without_a_new_incarnation() -> None:
    core = node_among(3)
    refutes(core, 5)
    effects = core.receive(address_of(2), Ping(sender(2), 5, ME, (Suspect(ME, 1, 2, peer_id(3)),)), 2.0)
    assert core.swim.myself.incarnation == 5
    assert messages(effects, Ack)[0][1].claims[0] == alive(0, incarnation=5)


def test_a_later_run_of_this_node_makes_it_count_as_a_still_later_one() -> None:
    core = node_among(3)
    core.publish(Facts(http="x"), 0.5)
    effects = core.receive(address_of(1), gossip(1, alive(0, epoch=7)), 1.0)
    assert only(EpochRenewed, effects) == [EpochRenewed(8)]
    assert FactsChanged(ME) in effects
    me = core.peer(ME)
    assert me is not None and (me.epoch, me.facts.http) == (8, "x")
    assert core.swim.statistics(0.0).conflicts_total == 1


def test_a_claim_about_us_that_nothing_could_refute_is_ignored() -> None:
    core = node_among(1)
    assert only(EpochRenewed, core.receive(address_of(1), gossip(1, alive(0, epoch=2**48)), 1.0)) == []
    assert core.swim.myself.epoch == 1


def test_hearsay_of_a_death_waits_for_the_accused_unless_it_was_long_suspected() -> None:
    core = node_among(4)
    run_to(core, 1.0, answers=True)
    death = Dead(peer_id(3), 1, 0, peer_id(1))
    core.receive(address_of(1), gossip(1, death), 1.0)
    assert state(core, 3) is PeerState.SUSPECT
    core.receive(address_of(2), gossip(2, alive(3, incarnation=1)), 1.5)
    assert state(core, 3) is PeerState.ALIVE
    run_to(core, 2.0, answers=True)
    core.receive(address_of(1), gossip(1, Suspect(peer_id(3), 1, 1, peer_id(2))), 2.0)
    run_to(core, 2.0 + 1.1)
    assert state(core, 3) is PeerState.SUSPECT
    core.receive(address_of(1), gossip(1, Dead(peer_id(3), 1, 1, peer_id(1))), 2.0 + 1.1)
    core.tick(core.deadline)
    assert state(core, 3) is PeerState.DEAD


def test_an_unanswered_hearsay_of_death_is_believed_after_half_the_shortest_suspicion() -> None:
    core = node_among(4)
    core.receive(address_of(1), gossip(1, Dead(peer_id(3), 1, 0, peer_id(1))), 0.0)
    run_to(core, 0.99, answers=True)
    assert state(core, 3) is PeerState.SUSPECT
    run_to(core, 1.01, answers=True)
    assert state(core, 3) is PeerState.DEAD


def test_the_dead_stay_dead_until_they_speak_with_a_higher_incarnation_or_epoch() -> None:
    for revival in (alive(3, incarnation=1), alive(3, epoch=2)):
        core = node_among(4)
        core.receive(address_of(1), gossip(1, Dead(peer_id(3), 1, 0, peer_id(1))), 0.0)
        run_to(core, 2.0, answers=True)
        for stale in (alive(3), Suspect(peer_id(3), 1, 0, peer_id(2))):
            effects = core.receive(address_of(2), Ping(sender(2), 1, ME, (stale,)), 3.0)
            assert state(core, 3) is PeerState.DEAD
            assert messages(effects, Ack)[0][1].claims[0] == Dead(peer_id(3), 1, 0, ME), "the teller is set right"
        effects = core.receive(address_of(2), gossip(2, revival), 3.1)
        assert state(core, 3) is PeerState.ALIVE
        [change] = only(MemberChanged, effects)
        assert change == MemberChanged(peer_id(3), PeerState.DEAD, PeerState.ALIVE, restarted=revival.epoch == 2)


def test_a_dead_member_that_sends_gets_a_correction() -> None:
    core = node_among(4)
    core.receive(address_of(1), gossip(1, Dead(peer_id(3), 1, 0, peer_id(1))), 0.0)
    run_to(core, 2.0, answers=True)
    received = [m for to, m in messages(core.receive(address_of(3), gossip(3), 2.6), Gossip) if to == address_of(3)]
    assert received[0].claims[0] == Dead(peer_id(3), 1, 0, ME)


def test_the_departed_are_never_called_dead() -> None:
    core = node_among(3)
    core.receive(address_of(2), gossip(2, left(peer_id(2), 1, 0)), 1.0)
    core.receive(address_of(1), gossip(1, Suspect(peer_id(2), 1, 0, peer_id(1)), Dead(peer_id(2), 1, 0, peer_id(1))), 1.1)
    run_to(core, 30.0, answers=True)
    assert state(core, 2) is PeerState.LEFT


def test_a_new_name_or_address_under_the_same_id_is_the_same_member() -> None:
    core = node_among(3)
    moved = alive(2, epoch=2, name="moved")
    core.receive(address_of(1), gossip(1, moved), 1.0)
    assert len(core.swim.members) == 4
    peer = core.peer(peer_id(2))
    assert peer is not None and (peer.name, peer.epoch) == ("moved", 2)


def test_an_independent_confirmation_shortens_the_wait_and_an_echo_does_not() -> None:
    core = node_among(9)
    core.receive(address_of(1), gossip(1, Suspect(peer_id(5), 1, 0, peer_id(1))), 0.0)
    suspicion = core.swim.members[peer_id(5)].suspicion
    assert suspicion is not None and math.isclose(suspicion.deadline, 6.0)
    core.receive(address_of(2), gossip(2, Suspect(peer_id(5), 1, 0, peer_id(1))), 0.1)
    assert math.isclose(suspicion.deadline, 6.0)
    core.receive(address_of(2), gossip(2, Suspect(peer_id(5), 1, 0, peer_id(2))), 0.1)
    assert math.isclose(suspicion.deadline, 4.0)


def test_a_suspect_receives_its_suspicion_with_the_next_ping() -> None:
    core = node_among(1)
    core.receive(address_of(1), gossip(1), 0.0)
    accusation = Suspect(peer_id(1), 1, 0, ME)
    core.swim.claims.declare(accusation, 0.0)
    [(_, ping), *_] = messages(run_to(core, 0.6), Ping)
    assert accusation in ping.claims


def test_a_broken_link_starts_a_probe_and_asks_others_at_once_and_only_once() -> None:
    core = node_among(4)
    effects = core.lost(peer_id(2), 0.0)
    assert [to for to, _ in messages(effects, Ping)] == [address_of(2)]
    assert {to for to, _ in messages(effects, PingReq)} == {address_of(1), address_of(3), address_of(4)}
    assert core.lost(peer_id(2), 0.1) == []
    assert core.lost(peer_id(9), 0.1) == core.lost(ME, 0.1) == []
    run_to(core, 2 * CONFIG.probe_timeout_s)
    assert state(core, 2) is PeerState.SUSPECT


def test_a_tick_that_comes_far_too_late_accuses_nobody() -> None:
    core = node_among(4)
    run_to(core, core.deadline)  # a probe is under way
    core.receive(address_of(1), gossip(1, Suspect(peer_id(3), 1, 0, peer_id(1))), 0.5)
    core.tick(100.0)
    assert all(state(core, n) is not PeerState.DEAD for n in range(1, 5))
    assert core.swim.statistics(0.0).sleeps_total == 1
    assert core.swim.statistics(0.0).probes_failed_total == 0


def test_what_is_heard_on_waking_gets_no_extra_time() -> None:
    core = node_among(4)
    core.receive(address_of(1), gossip(1, Suspect(peer_id(3), 1, 0, peer_id(1))), 100.0)
    core.tick(100.0)
    suspicion = core.swim.members[peer_id(3)].suspicion
    assert suspicion is not None and suspicion.deadline <= 100.0 + suspicion.max_s


def test_unknown_senders_and_other_fingerprints_start_rate_limited_exchanges() -> None:
    core = node_among(2)
    assert only(StartSync, core.receive(address_of(7), gossip(7), 10.0)) == [StartSync(address_of(7))]
    assert only(StartSync, core.receive(address_of(7), gossip(7), 10.1)) == []
    assert only(StartSync, core.receive(address_of(7), gossip(7), 10.6)) == [StartSync(address_of(7))]
    newer = Gossip(sender(1, incarnation=3))
    assert only(StartSync, core.receive(address_of(1), newer, 11.0)) == [StartSync(address_of(1))]
    foreign = Gossip(sender(2, fingerprint=1))
    assert only(StartSync, core.receive(address_of(2), foreign, 12.0)) == [StartSync(address_of(2))]
    equal = Gossip(sender(2, fingerprint=core.fingerprint))
    assert only(StartSync, core.receive(address_of(2), equal, 20.0)) == []


def test_dead_addresses_and_absent_seeds_are_dialled_now_and_then() -> None:
    core = node_among(2)
    core.swim.remember_seed(("10.1.1.1", 1))
    core.swim.remember_seed(address_of(1))  # a live member's: no need
    run_to(core, 6.0)
    effects = run_to(core, 60.0)
    dialled = {to for to, ping in messages(effects, Ping)}
    assert dialled == {address_of(1), address_of(2)}, "both are dead by now"
    assert StartSync(("10.1.1.1", 1)) in effects
    assert len(messages(effects, Ping)) <= 54 / (0.75 * CONFIG.redial_period_s) + 1


def test_in_a_large_mesh_few_nodes_redial_the_dead_and_all_their_seeds() -> None:
    core = node_among(400)
    core.receive(address_of(2), gossip(2, Suspect(peer_id(1), 1, 0, peer_id(2))), 0.0)
    core.receive(address_of(2), gossip(2, Dead(peer_id(1), 1, 0, peer_id(2))), 9.0)
    run_to(core, 9.0, answers=True)  # the verdict is carried out by the clock, which knows of sleeps
    assert state(core, 1) is PeerState.DEAD
    core.remember_seed(("10.8.8.8", 9))
    periods = 500
    effects = run_to(core, 9.0 + periods * CONFIG.redial_period_s, answers=True)
    dead = [ping for to, ping in messages(effects, Ping) if to == address_of(1)]
    seed = [exchange for exchange in only(StartSync, effects) if exchange.to == ("10.8.8.8", 9)]
    assert 2 <= len(dead) <= 40, "of 400 nodes 17 in each period, so this one about 21 times in 500, half of them a seed"
    assert len(seed) > 0.9 * periods - len(dead)


def test_a_tombstone_is_dropped_in_the_end_with_all_that_was_known() -> None:
    core = node_among(2, config=MembershipConfig(forget_s=10.0))
    effects = run_to(core, 30.0)
    assert set(only(MemberForgotten, effects)) == {MemberForgotten(peer_id(1)), MemberForgotten(peer_id(2))}
    assert core.peer(peer_id(1)) is None and len(core.swim.members) == 1


def test_a_full_table_lets_newcomers_in_for_tombstones_only() -> None:
    core = node_among(3, config=MembershipConfig(members_max=4))
    core.receive(address_of(1), gossip(1, alive(8)), 1.0)
    assert state(core, 8) is None and core.swim.statistics(0.0).refused_newcomers_total == 1
    core.receive(address_of(2), gossip(2, left(peer_id(2), 1, 0)), 1.1)
    core.receive(address_of(1), gossip(1, alive(8)), 1.2)
    assert state(core, 8) is PeerState.ALIVE and state(core, 2) is None


def test_a_node_that_leaves_sends_its_farewell_and_nothing_more() -> None:
    core = node_among(3)
    effects = core.leave(1.0)
    assert {to for to, received in messages(effects, Gossip) if received.claims == (left(ME, 1, 0),)} == {
        address_of(n) for n in (1, 2, 3)
    }
    assert core.deadline == math.inf
    assert core.receive(address_of(1), Ping(sender(1), 1, ME), 2.0) == core.tick(9.0) == core.lost(peer_id(1), 9.0) == []
    assert only(PushFacts, core.leave(3.0)) == []


def test_own_claims_that_return_change_nothing() -> None:
    core = node_among(2)
    assert core.receive(("10.9.9.9", 1), Gossip(sender(0), (alive(5),)), 1.0) == []
    assert state(core, 5) is None


def test_a_stale_accusation_is_answered_to_others_too_for_it_still_travels() -> None:
    core = node_among(4)
    refutes(core, 5)
    effects = core.receive(address_of(2), gossip(2, Suspect(ME, 1, 2, peer_id(3))), 50.0)
    received = {to for to, received in messages(effects, Gossip) if alive(0, incarnation=5) in received.claims}
    assert address_of(2) in received and len(received) == 1 + CONFIG.eager_peers


def test_a_suspect_that_sends_gets_its_suspicion_first() -> None:
    core = node_among(3)
    accusation = Suspect(peer_id(2), 1, 0, peer_id(1))
    core.receive(address_of(1), gossip(1, accusation), 1.0)
    [(_, ack)] = messages(core.receive(address_of(2), Ping(sender(2), 1, ME), 1.1), Ack)
    assert ack.claims[0] == accusation
    answers = [received for to, received in messages(core.receive(address_of(2), gossip(2), 1.2), Gossip) if to == address_of(2)]
    assert answers[0].claims[0] == accusation


def test_a_member_that_sent_since_the_probe_is_not_suspected() -> None:
    core = node_among(1)
    [(_, ping)] = messages(run_to(core, core.deadline), Ping)
    probe = core.swim.probes.under_way[ping.seq]
    core.receive(address_of(1), gossip(1), probe.sent_at + 0.1)
    run_to(core, probe.ends_at)
    assert not core.swim.probes.under_way.get(ping.seq) and state(core, 1) is PeerState.ALIVE


def test_a_seed_given_by_host_name_is_not_dialled_while_the_node_met_there_lives() -> None:
    core = node_among(1)
    core.swim.remember_seed(("seed.example", 1))
    core.learn(("seed.example", 1), Synced(peer_id(1)), 0.0)
    assert only(StartSync, run_to(core, 60.0, answers=True)) == []
    assert StartSync(("seed.example", 1)) in run_to(core, 180.0), "it died, so the name may stand for another now"
