"""The member table where its first contents are shared, held against one that has all for itself."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from membership.core.members import Member, Members, description_of
from membership.facts.fingerprint import Fingerprint
from membership.simulation.shared_members import SharedMembers, SharedRecords
from mesh.ids import NodeId
from mesh.view import PeerState
from tests.membership.pieces import alive, peer_id

COUNT = 8
REGIONS = ("", "east", "west")
STATES = st.sampled_from(list(PeerState))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, COUNT + 2), STATES, st.sampled_from(REGIONS), st.integers(0, 3)),
        st.tuples(st.just("forget"), st.integers(1, COUNT + 2), STATES, st.just(""), st.just(0)),
        st.tuples(st.just("look"), st.integers(1, COUNT + 2), STATES, st.just(""), st.just(0)),
    ),
    max_size=30,
)


def member(number: int, state: PeerState = PeerState.ALIVE, region: str = "", incarnation: int = 0) -> Member:
    words = msgspec.structs.replace(alive(number, incarnation), region=region)
    return Member(words.node, description_of(words), 1, incarnation, state, 0.0, key=words.key, signature=words.signature)


def two_tables(regions: list[str]) -> tuple[Members, SharedMembers, SharedRecords]:
    """One with all for itself, one that shares, and what is shared."""
    common = SharedRecords(member(number, region=region) for number, region in enumerate(regions))
    plain = Members(member(0, region=regions[0]), Fingerprint())
    for number, region in enumerate(regions[1:], 1):
        plain.put(member(number, region=region))
    sharing = SharedMembers(member(0, region=regions[0]), Fingerprint())
    sharing.found(common)
    return plain, sharing, common


def shown(members: Members) -> object:
    """Returns all that a table reports without reading a record."""
    return (
        sorted((m.node, m.standing, m.description, m.key, m.signature) for m in members),
        len(members),
        members.roster.ids,
        members.near.ids,
        {region: roster.ids for region, roster in members.abroad.items()},
        members.suspects,
        members.gone,
        members.fingerprint.value,
        members.oldest_tombstone(),
        [peer_id(n) in members for n in range(COUNT + 3)],
    )


@given(st.lists(st.sampled_from(REGIONS), min_size=COUNT, max_size=COUNT), STEPS)
def test_a_table_that_shares_shows_what_one_that_does_not_would(
    regions: list[str], steps: list[tuple[str, int, PeerState, str, int]]
) -> None:
    plain, sharing, common = two_tables(regions)
    assert shown(sharing) == shown(plain)
    before = {node: (m.standing, m.description) for node, m in common.members.items()}
    for what, number, state, region, incarnation in steps:
        node = peer_id(number)
        for members in (plain, sharing):
            if what == "put" and (known := members.get(node)) is not None:
                known.state, known.incarnation = state, incarnation
                known.description = (*known.description[:5], region)
                members.put(known)
            elif what == "put":
                members.put(member(number, state, region, incarnation))
            elif what == "forget" and node in members:
                members.forget(node)
            elif (known := members.get(node)) is not None:
                known.rtt_s = 1.0
        assert shown(sharing) == shown(plain)
        living = [m.node for m in plain if m.live]
        assert sharing.live_count == len(living)
        by_region = {region: tuple(sorted(m.node for m in plain if m.live and m.region == region)) for region in REGIONS}
        assert sharing.near.ids == by_region[regions[0]]
        assert {name: roster.ids for name, roster in sharing.abroad.items()} == {
            name: ids for name, ids in by_region.items() if ids and name != regions[0]
        }
    assert {node: (m.standing, m.description) for node, m in common.members.items()} == before, "what is shared stays as it is"
    assert all(m.rtt_s is None for m in common.members.values())


def test_tables_that_learn_of_the_same_death_hold_the_same_list() -> None:
    _, one, common = two_tables([""] * COUNT)
    other = SharedMembers(member(1), Fingerprint())
    other.found(common)
    for members in (one, other):
        dead = members[peer_id(5)]
        dead.state = PeerState.DEAD
        members.put(dead)
    assert one.roster is other.roster and peer_id(5) not in one.roster
    assert one.peek(peer_id(3)) is other.peek(peer_id(3)), "nobody has looked at this one"


def test_an_address_is_returned_for_members_only() -> None:
    _, sharing, common = two_tables([""] * COUNT)
    assert sharing.address_of(peer_id(2)) == alive(2).address
    assert sharing.peek(peer_id(2)) is common.members[peer_id(2)]
    for ask in (sharing.address_of, sharing.__getitem__):
        try:
            ask(NodeId("f" * 16))
        except KeyError:
            continue
        raise AssertionError("nobody has this id")
