"""Whose turn it is to be probed."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from membership.core.members import Members
from membership.core.regions import ProbeRound, ProbeSchedule
from membership.core.roster import MemberIds
from membership.facts.fingerprint import Fingerprint
from mesh.view import PeerState
from tests.membership.pieces import ME, peer_id
from tests.membership.test_members import member


def mesh_of(peers: int) -> Members:
    members = Members(member(0), Fingerprint())
    for number in range(1, peers + 1):
        members.put(member(number))
    return members


@given(st.lists(st.integers(0, 12), max_size=3), st.integers(0, 1000))
def test_a_round_meets_everybody_once_before_anybody_twice(sizes: list[int], seed: int) -> None:
    numbers = iter(range(1, 100))
    rosters = [MemberIds(peer_id(next(numbers)) for _ in range(size)) for size in sizes]
    turns, everybody = ProbeRound(Random(seed)), {node for roster in rosters for node in roster.ids}
    for _ in range(3):
        met = [turns.following(rosters, ME) for _ in everybody]
        assert set(met) == everybody
    assert everybody or turns.following(rosters, ME) is None


@given(st.integers(2, 12), st.integers(0, 1000), st.integers(0, 12))
def test_a_newcomer_gets_its_turn_in_the_round_under_way_and_the_gone_get_none(peers: int, seed: int, already: int) -> None:
    roster, turns = MemberIds(peer_id(n) for n in range(peers + 1)), ProbeRound(Random(seed))
    met = [turns.following((roster,), ME) for _ in range(min(already, peers - 1))]
    newcomer, gone = peer_id(50), peer_id(1)
    turns.joined(newcomer)
    turns.joined(newcomer)
    roster = roster.having(newcomer).lacking(gone)
    rest = [turns.following((roster,), ME) for _ in range(peers - len(met) - (gone not in met) + (len(met) > 0))]
    assert gone not in rest and ME not in rest
    assert Counter(rest)[newcomer] <= 1 or not met
    assert newcomer in rest
    assert len(set(met) & set(rest)) == 0 or not met


@given(st.integers(2, 12), st.integers(0, 1000))
def test_a_newcomer_that_went_again_before_its_turn_gets_none(peers: int, seed: int) -> None:
    roster, turns = MemberIds(peer_id(n) for n in range(peers + 1)), ProbeRound(Random(seed))
    first = turns.following((roster,), ME)
    turns.joined(peer_id(50))
    rest = [turns.following((roster,), ME) for _ in range(peers - 1)]
    assert {first, *rest} == {peer_id(n) for n in range(1, peers + 1)}


def test_every_other_turn_is_the_neighbours_and_the_others_come_round_between() -> None:
    members, patrol = mesh_of(6), ProbeSchedule(Random(3))
    turns = [patrol.next_target(members) for _ in range(24)]
    assert turns[::2] == [peer_id(1)] * 12, "the next one on the ring"
    assert all(set(turns[1 + 12 * k : 13 + 12 * k : 2]) == {peer_id(n) for n in range(1, 7)} for k in range(2))
    members.suspects.add(peer_id(1))
    assert peer_id(2) in (patrol.next_target(members), patrol.next_target(members)), "that one is looked into already"
    first = members[peer_id(1)]
    first.state = PeerState.DEAD
    members.put(first)
    turns = [patrol.next_target(members) for _ in range(24)]
    assert turns[::2] == [peer_id(2)] * 12 and peer_id(1) not in turns, "now that one is next"


def test_a_node_alone_probes_nobody() -> None:
    assert ProbeSchedule(Random(1)).next_target(mesh_of(0)) is None
