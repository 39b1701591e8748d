"""What a sleep of this node proves (nothing), and what is left of members and cases that are gone (nothing)."""

from __future__ import annotations

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import MemberChanged, MemberForgotten, TryConnect
from mesh.view import PeerState
from mesh.wire.gossip import REFUSED, Dead, Suspect
from mesh.wire.sync import Sync
from tests.membership.pieces import (
    ME,
    address_of,
    alive,
    gossip,
    left,
    member_record,
    node_among,
    only,
    peer_id,
    run_to,
    state,
)


def suspecting(number: int = 2) -> MembershipCore:
    """A node that has just begun to suspect the peer, at one second, and has nothing else to do then."""
    core = node_among(5)
    run_to(core, 1.0, answers=True)
    core.receive(address_of(3), gossip(3, Suspect(peer_id(number), 1, 0, peer_id(3))), 1.0)
    assert state(core, number) is PeerState.SUSPECT
    return core


def test_a_verdict_read_after_a_suspension_does_not_count_it_as_silence() -> None:
    core = suspecting()
    woken_at = 61.0
    effects = core.receive(address_of(3), gossip(3, Dead(peer_id(2), 1, 0, peer_id(3))), woken_at)
    assert state(core, 2) is PeerState.SUSPECT, "its refutation lies in the same buffer"
    effects += core.receive(address_of(2), gossip(2, alive(2, incarnation=1), incarnation=1), woken_at)
    effects += core.tick(woken_at)
    assert state(core, 2) is PeerState.ALIVE
    assert PeerState.DEAD not in {change.after for change in only(MemberChanged, effects)}


def test_a_verdict_that_comes_with_an_exchange_on_waking_does_not_either() -> None:
    core = suspecting()
    record = member_record(alive(2), PeerState.DEAD, age_s=40.0)
    core.answer(peer_id(3), Sync(members=(record,)), 61.0)
    assert state(core, 2) is PeerState.SUSPECT


def test_a_suspension_extends_deadlines_once_and_a_silent_suspect_dies() -> None:
    core = suspecting()
    for number in (3, 4):
        core.receive(address_of(number), gossip(number), 61.0)
    core.tick(61.0)
    assert core.swim.statistics(61.0).sleeps_total == 1
    lag_s = core.swim.state.health.lag_s(61.0)
    run_to(core, 61.0 + 12.0 + 2 * lag_s)
    assert state(core, 2) is PeerState.DEAD


def test_input_that_comes_in_time_forgives_nothing() -> None:
    core = suspecting()
    for step in range(1, 20):
        core.receive(address_of(3), gossip(3), 1.0 + step * 1e-3)
    assert core.swim.statistics(1.1).sleeps_total == 0


def test_a_doubted_death_of_one_that_is_forgotten_in_the_same_breath_ends_nothing() -> None:
    """One exchange brings a refused death of a linked peer, its goodbye, and a newcomer for whom its tombstone makes room."""
    core = node_among(2, config=MembershipConfig(members_max=3))
    core.linked(peer_id(1))
    gone = member_record(alive(1), PeerState.LEFT)
    news = (member_record(alive(1), PeerState.DEAD, cause=REFUSED), gone, member_record(alive(7)))
    _, effects = core.answer(peer_id(2), Sync(members=news), 1.0)
    assert only(MemberForgotten, effects) == [MemberForgotten(peer_id(1))] and state(core, 7) is PeerState.ALIVE


def test_nothing_is_kept_of_a_tombstone_that_made_room() -> None:
    core = node_among(2, config=MembershipConfig(members_max=3))
    core.swim.state.distances.measured(
        core.swim.members[peer_id(1)], 0.01, core.swim.state.distances.point_for_ack(b""), lagging=False
    )
    core.receive(address_of(2), gossip(2, left(peer_id(1), 1, 0)), 1.0)
    core.receive(address_of(2), gossip(2, alive(9)), 1.0)
    assert state(core, 1) is None and state(core, 9) is PeerState.ALIVE
    assert not core.swim.state.distances.position.has_samples(peer_id(1))
    assert peer_id(1) not in core.swim.state.rumours.by_node


def test_a_closed_case_does_not_prevent_checks_of_the_next_run() -> None:
    """A peer crashed, came back, and falls silent: those who watch it look whether its process exists, as they always do."""
    core = node_among(5)
    run_to(core, 1.0, answers=True)
    core.linked(peer_id(2))
    (tried,) = only(TryConnect, core.lost(peer_id(2), 1.0, proven=True))
    core.tried(tried.number, True, 1.0)
    assert peer_id(2) in core.swim.refusals.cases
    core.receive(address_of(2), gossip(2, alive(2, epoch=2)), 3.5)
    core.linked(peer_id(2))
    effects = core.receive(address_of(3), gossip(3, Suspect(peer_id(2), 2, 0, peer_id(3))), 4.0)
    assert [each.to for each in only(TryConnect, effects)] == [address_of(2)] and core.me == ME


def test_cases_of_all_who_ever_crashed_are_not_kept() -> None:
    core = node_among(40)
    for number in range(1, 31):
        core.linked(peer_id(number))
        (tried,) = only(TryConnect, core.lost(peer_id(number), 1.0 + number * 1e-3, proven=True))
        core.tried(tried.number, True, 1.0 + number * 1e-3)
    assert len(core.swim.refusals.cases) == 30
    run_to(core, 8.0)
    assert core.swim.refusals.cases == {}
