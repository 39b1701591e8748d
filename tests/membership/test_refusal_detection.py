"""What the ends of links prove, and what they do not."""

from __future__ import annotations

import pytest

from membership.core.core import MembershipCore
from membership.core.effects import MembershipEffect, TryConnect, WatchLinks
from membership.core.refusal_detection import MAX_CONNECT_PROBES
from membership.core.suspicion import Suspicion
from mesh.view import PeerState
from mesh.wire.gossip import REFUSED, ConnectCheck, ConnectChecked, Dead, Suspect
from tests.membership.pieces import ME, address_of, alive, gossip, messages, node_among, only, peer_id, sender, state


def a_lost_link(peers: int = 6, to: int = 2) -> tuple[MembershipCore, int]:
    core = node_among(peers)
    core.linked(peer_id(to))
    effects = core.lost(peer_id(to), 1.0, proven=True)
    return core, only(TryConnect, effects)[0].number


def knocks(effects: list[MembershipEffect]) -> list[int]:
    return [to[1] - 7000 for to, _ in messages(effects, ConnectCheck)]


def test_a_broken_link_is_followed_up_with_a_connection_of_our_own() -> None:
    core = node_among(6)
    core.linked(peer_id(2))
    [attempt] = only(TryConnect, core.lost(peer_id(2), 1.0, proven=True))
    assert attempt.to == address_of(2)
    assert state(core, 2) is PeerState.ALIVE


def test_a_link_that_never_came_about_proves_nothing() -> None:
    assert only(TryConnect, node_among(6).lost(peer_id(2), 1.0)) == []


def test_a_refusal_here_and_at_two_relays_is_a_death_with_its_cause() -> None:
    core, number = a_lost_link()
    relays = knocks(core.tried(number, True, 1.001))
    assert len(relays) == 3 and 2 not in relays
    core.receive(address_of(relays[0]), ConnectChecked(sender(relays[0]), number, True), 1.002)
    assert state(core, 2) is PeerState.ALIVE, "one relay is not enough"
    effects = core.receive(address_of(relays[1]), ConnectChecked(sender(relays[1]), number, True), 1.003)
    assert state(core, 2) is PeerState.DEAD
    received = [claim for _, message in messages(effects, type(gossip(1))) for claim in message.claims]
    assert Dead(peer_id(2), 1, 0, ME, REFUSED) in received
    assert (peer := core.peer(peer_id(2))) is not None and peer.cause == "refused"


@pytest.mark.parametrize("answers", [(True, False, False), (False, False, False), (True,), ()])
def test_fewer_than_two_relays_that_are_refused_leave_it_to_the_probes(answers: tuple[bool, ...]) -> None:
    core, number = a_lost_link()
    relays = knocks(core.tried(number, True, 1.001))
    for relay, refused in zip(relays, answers, strict=False):
        core.receive(address_of(relay), ConnectChecked(sender(relay), number, refused), 1.002)
        core.receive(address_of(relay), ConnectChecked(sender(relay), number, refused), 1.002)  # twice is once
    assert state(core, 2) is PeerState.ALIVE


def test_only_requested_relays_count_and_only_under_the_request_number() -> None:
    core, number = a_lost_link(12)
    relays = knocks(core.tried(number, True, 1.001))
    strangers = [other for other in range(1, 13) if other not in (*relays, 2)]
    for other in strangers:
        core.receive(address_of(other), ConnectChecked(sender(other), number, True), 1.002)
    for relay in relays:
        core.receive(address_of(relay), ConnectChecked(sender(relay), number + 1, True), 1.002)
    assert state(core, 2) is PeerState.ALIVE


def test_refusals_at_relays_alone_do_not_kill_a_reachable_member() -> None:
    core, number = a_lost_link()
    assert knocks(core.tried(number, False, 1.001)) == []
    for relay in (1, 3, 4):
        core.receive(address_of(relay), ConnectChecked(sender(relay), number, True), 1.002)
    assert state(core, 2) is PeerState.ALIVE


def test_late_refusals_prove_nothing() -> None:
    core, number = a_lost_link()
    relays = knocks(core.tried(number, True, 1.001))
    for relay in relays:
        core.receive(address_of(relay), ConnectChecked(sender(relay), number, True), 9.0)
    assert state(core, 2) is not PeerState.DEAD or core.swim.members[peer_id(2)].cause != REFUSED


def test_one_that_refuted_or_restarted_meanwhile_stays_alive() -> None:
    for later in (alive(2, incarnation=1), alive(2, epoch=2)):
        core, number = a_lost_link()
        relays = knocks(core.tried(number, True, 1.001))
        core.receive(address_of(5), gossip(5, later), 1.002)
        for relay in relays:
            core.receive(address_of(relay), ConnectChecked(sender(relay), number, True), 1.003)
        assert state(core, 2) is PeerState.ALIVE


def test_a_mesh_of_two_has_no_relays_and_of_three_has_one() -> None:
    core, number = a_lost_link(2)
    [relay] = knocks(core.tried(number, True, 1.001))
    assert state(core, 2) is PeerState.ALIVE
    core.receive(address_of(relay), ConnectChecked(sender(relay), number, True), 1.002)
    assert state(core, 2) is PeerState.DEAD
    core, number = a_lost_link(2, to=1)
    core.swim.claims.apply(Dead(peer_id(2), 1, 0, peer_id(2), REFUSED), 1.0)
    core.tried(number, True, 1.001)
    assert state(core, 1) is PeerState.DEAD


def test_a_node_without_a_link_accepts_a_refused_death_at_once() -> None:
    core = node_among(6)
    core.receive(address_of(3), gossip(3, Dead(peer_id(2), 1, 0, peer_id(4), REFUSED)), 1.0)
    assert state(core, 2) is PeerState.DEAD


def test_a_node_with_a_link_checks_a_refused_death_itself() -> None:
    for refused, expected in ((True, PeerState.DEAD), (False, PeerState.SUSPECT)):
        core = node_among(6)
        core.linked(peer_id(2))
        effects = core.receive(address_of(3), gossip(3, Dead(peer_id(2), 1, 0, peer_id(4), REFUSED)), 1.0)
        assert state(core, 2) is PeerState.SUSPECT
        [attempt] = only(TryConnect, effects)
        assert knocks(core.tried(attempt.number, refused, 1.001)) == [], "nobody else needs to be asked"
        assert state(core, 2) is expected


def test_a_refused_death_is_undone_by_the_next_incarnation() -> None:
    core = node_among(6)
    core.receive(address_of(3), gossip(3, Dead(peer_id(2), 1, 0, peer_id(4), REFUSED)), 1.0)
    core.receive(address_of(2), gossip(2, alive(2, incarnation=1), incarnation=1), 1.1)
    assert state(core, 2) is PeerState.ALIVE
    assert core.swim.members[peer_id(2)].cause == ""


def test_a_relay_connects_to_members_only_and_reports_the_outcome() -> None:
    core = node_among(6)
    knock = ConnectCheck(sender(1), 77, peer_id(2))
    [attempt] = only(TryConnect, core.receive(address_of(1), knock, 1.0))
    assert attempt.to == address_of(2)
    [(to, found)] = messages(core.tried(attempt.number, True, 1.001), ConnectChecked)
    assert (to, found.seq, found.refused) == (address_of(1), 77, True)
    assert core.tried(attempt.number, True, 1.002) == [], "the death is declared once"
    for target in (peer_id(99), ME):
        assert only(TryConnect, core.receive(address_of(1), ConnectCheck(sender(1), 78, target), 1.0)) == []


def test_errands_for_others_are_bounded_and_free_themselves() -> None:
    core = node_among(6)
    begun = [
        only(TryConnect, core.receive(address_of(1), ConnectCheck(sender(1), n, peer_id(2)), 1.0))
        for n in range(MAX_CONNECT_PROBES + 50)
    ]
    assert sum(map(len, begun)) == MAX_CONNECT_PROBES
    assert only(TryConnect, core.receive(address_of(1), ConnectCheck(sender(1), 1, peer_id(2)), 60.0)) != []


def test_links_to_ring_successors_are_kept_and_requested_again_when_missing() -> None:
    core = node_among(9)
    assert [node for node, _ in core.swim.refusals.watched] == [peer_id(n) for n in (1, 2, 3, 4)]
    effects = core.receive(address_of(5), gossip(5, Dead(peer_id(2), 1, 0, peer_id(4), REFUSED)), 1.0)
    assert only(WatchLinks, effects) == [WatchLinks(tuple(address_of(n) for n in (1, 3, 4, 5)))]
    assert core.swim.refusals.watch() == []
    assert core.swim.refusals.watch(again=True) != []
    for number in (1, 3, 4, 5):
        core.linked(peer_id(number))
    assert core.swim.refusals.watch(again=True) == []


def test_two_links_with_a_peer_end_one_by_one() -> None:
    core = node_among(6)
    core.linked(peer_id(2))
    core.linked(peer_id(2))
    core.lost(peer_id(2), 1.0, proven=True)
    assert core.swim.state.linked == {peer_id(2): 1}
    core.lost(peer_id(2), 1.1, proven=True)
    assert core.swim.state.linked == {}


def test_a_suspicion_without_answer_ends_in_a_timeout_death() -> None:
    core = node_among(6)
    core.receive(address_of(3), gossip(3, Suspect(peer_id(2), 1, 0, peer_id(3))), 1.0)
    while state(core, 2) is PeerState.SUSPECT:
        core.tick(core.deadline)
    assert core.swim.members[peer_id(2)].cause == "timeout"


def a_suspect_that_is_looked_at(linked: bool = True) -> tuple[MembershipCore, list[TryConnect]]:
    core = node_among(6)
    if linked:
        core.linked(peer_id(2))
    effects = core.receive(address_of(1), gossip(1, Suspect(peer_id(2), 1, 0, peer_id(1))), 1.0)
    return core, only(TryConnect, effects)


def suspicion_of(core: MembershipCore) -> Suspicion:
    suspicion = core.swim.members[peer_id(2)].suspicion
    assert suspicion is not None
    return suspicion


def test_a_host_that_answers_no_connection_either_has_one_more_accuser() -> None:
    core, [attempt] = a_suspect_that_is_looked_at()
    before_s = suspicion_of(core).deadline
    core.tried(attempt.number, None, 1.5)
    suspicion = suspicion_of(core)
    assert state(core, 2) is PeerState.SUSPECT and suspicion.deadline < before_s
    assert not suspicion.confirm([ME]), "this node has been counted"


def test_a_silent_host_is_accused_only_by_healthy_nodes_with_a_link() -> None:
    assert a_suspect_that_is_looked_at(linked=False)[1] == []
    core, [attempt] = a_suspect_that_is_looked_at()
    before_s = suspicion_of(core).deadline
    core.swim.state.health.note(+1)
    core.tried(attempt.number, None, 1.5)
    assert suspicion_of(core).deadline == before_s
