"""The list of the living, and how often each of it comes round."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from membership.core.roster import MemberIds, some_of
from tests.membership.pieces import peer_id

NUMBERS = st.integers(0, 30)


@given(st.sets(NUMBERS), st.lists(st.tuples(st.booleans(), NUMBERS), max_size=40))
def test_a_roster_is_an_ascending_list_of_what_came_and_did_not_go(first: set[int], steps: list[tuple[bool, int]]) -> None:
    roster, there = MemberIds(peer_id(n) for n in first), set(first)
    for comes, number in steps:
        before = roster.ids
        kept = roster
        roster = roster.having(peer_id(number)) if comes else roster.lacking(peer_id(number))
        (there.add if comes else there.discard)(number)
        assert kept.ids == before, "who holds the one before is not disturbed"
        assert roster.ids == tuple(peer_id(n) for n in sorted(there))
        assert all((peer_id(n) in roster) is (n in there) for n in range(31))


def test_equal_members_share_one_list() -> None:
    base = MemberIds(peer_id(n) for n in range(5))
    one, other = base.lacking(peer_id(3)), base.lacking(peer_id(3))
    assert one is other
    assert one.having(peer_id(3)) is base and base.having(peer_id(3)) is base and one.lacking(peer_id(3)) is one


@given(st.sets(NUMBERS, min_size=1), st.integers(0, 40), st.data())
def test_successors_follow_round_the_ring_without_the_node_itself(ids: set[int], count: int, data: st.DataObject) -> None:
    me = data.draw(st.sampled_from(sorted(ids)))
    ring = sorted(ids)
    at = ring.index(me)
    expected = (ring[at + 1 :] + ring[:at])[:count]
    assert MemberIds(peer_id(n) for n in ids).after(peer_id(me), count) == [peer_id(n) for n in expected]


@given(st.sets(NUMBERS), st.integers(0, 12), st.lists(NUMBERS, max_size=4), st.integers(0, 1000))
def test_some_are_different_ones_of_the_list_and_as_many_as_there_are(
    ids: set[int], count: int, without: list[int], seed: int
) -> None:
    halves = [MemberIds(peer_id(n) for n in ids if n % 2 == half) for half in (0, 1)]
    drawn = some_of(halves, count, Random(seed), tuple(peer_id(n) for n in without))
    left = ids - set(without)
    assert len(drawn) == len(set(drawn)) == min(count, len(left))
    assert set(drawn) <= {peer_id(n) for n in left}


def test_everybody_is_drawn_as_often_as_anybody_else() -> None:
    rosters, rng, draws = [MemberIds(peer_id(n) for n in part) for part in (range(7), range(7, 20))], Random(7), 20_000
    drawn = Counter(node for _ in range(draws) for node in some_of(rosters, 3, rng, (peer_id(0),)))
    expected = 3 * draws / 19
    spread = sum((drawn[peer_id(n)] - expected) ** 2 / expected for n in range(1, 20))
    assert drawn[peer_id(0)] == 0
    assert spread < 42.3, "chi square with 18 degrees of freedom, 0.1 %"
