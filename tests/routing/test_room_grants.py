"""A full stage shares the room it frees: oldest first over all entries, never reserved for long, never lost with a message."""

from mesh.ids import NodeId
from routing.room_grants import DEMAND_S, GRANT_S, MAX_HEADS, RoomGrants, WaitingRequest

A, B = NodeId("a"), NodeId("b")


def since(*times: float, priority: int = 0) -> list[WaitingRequest]:
    return [WaitingRequest(continued=False, priority=priority, since=time) for time in times]


def test_the_request_that_waited_longest_gets_the_place_whoever_its_entry_is() -> None:
    grants = RoomGrants()
    grants.demand(A, since(5.0, 6.0, 7.0), 0, 10.0)
    grants.demand(B, since(1.0, 8.0), 0, 10.0)
    assert grants.grant(1, 10.0) == {B: 1}
    assert grants.grant(4, 10.0) == {A: 3}
    assert grants.grant(4, 10.0) == {}, "four places are reserved"
    assert grants.grant(6, 10.0) == {B: 1}


def test_priority_goes_before_age_and_continued_requests_before_both() -> None:
    grants = RoomGrants()
    grants.demand(A, since(1.0), 0, 10.0)
    grants.demand(B, since(9.0, priority=-1), 0, 10.0)
    assert grants.grant(1, 10.0) == {B: 1}
    grants.demand(B, [WaitingRequest(continued=True, priority=5, since=9.9)], 1, 10.0)
    assert grants.grant(2, 10.0) == {B: 1}


def test_an_open_without_a_grant_is_refused_while_others_wait() -> None:
    grants = RoomGrants()
    assert grants.admits(A, 1) and not grants.admits(A, 0)
    grants.demand(B, since(1.0), 0, 1.0)
    assert not grants.admits(A, 5)
    assert grants.grant(5, 1.0) == {B: 1}
    assert grants.admits(A, 5), "four places are neither reserved nor waited for"
    assert not grants.admits(A, 1), "the last one is reserved"
    assert grants.admits(B, 1) and grants.reserved == 0


def test_a_place_that_is_not_taken_in_time_goes_to_the_next() -> None:
    grants = RoomGrants()
    grants.demand(A, since(1.0), 0, 1.0)
    grants.demand(B, since(2.0), 0, 1.0)
    assert grants.grant(1, 1.0) == {A: 1}
    assert grants.grant(1, 1.0 + GRANT_S / 2) == {}
    assert grants.deadline == 1.0 + GRANT_S
    assert grants.grant(1, 1.0 + GRANT_S) == {B: 1}


def test_an_entry_that_needs_no_room_any_more_gives_its_grants_back() -> None:
    grants = RoomGrants()
    grants.demand(A, since(1.0, 1.5), 0, 2.0)
    grants.demand(B, since(2.0), 0, 2.0)
    assert grants.grant(2, 2.0) == {A: 2}
    grants.demand(A, [], 2, 2.0)
    assert grants.grant(2, 2.0) == {B: 1} and grants.reserved == 1
    grants.forget(B)
    assert grants.reserved == 0


def test_a_demand_sent_before_its_grant_arrived_does_not_get_it_twice() -> None:
    grants = RoomGrants()
    grants.demand(A, since(1.0, 2.0), 0, 2.0)
    assert grants.grant(1, 2.0) == {A: 1}
    grants.demand(A, since(1.0, 2.0), 0, 2.0)  # crossed with the grant
    assert grants.grant(9, 2.0) == {A: 1}
    grants.demand(A, since(3.0), 2, 3.0)
    assert grants.grant(9, 3.0) == {A: 1}


def test_counts_begin_anew_after_an_entry_needed_no_room() -> None:
    grants = RoomGrants()
    grants.demand(A, since(1.0), 0, 1.0)
    assert grants.grant(1, 1.0) == {A: 1} and grants.admits(A, 1)
    grants.demand(A, [], 1, 2.0)
    grants.demand(A, since(3.0, 4.0), 0, 5.0)
    assert grants.grant(1, 5.0) == {A: 1}
    grants.demand(A, since(4.0), 1, 5.1)  # it has received the grant, and its open is on the way
    grants.demand(B, since(4.5), 0, 5.1)
    assert grants.grant(2, 5.1) == {A: 1}, "its request has waited longer than B's"


def test_a_lost_grant_is_given_again_once_its_time_is_over() -> None:
    grants = RoomGrants()
    grants.demand(A, since(1.0), 0, 1.0)
    assert grants.grant(1, 1.0) == {A: 1}
    now = 1.0 + GRANT_S
    grants.expire(now)
    grants.demand(A, since(1.0), 0, now)
    assert grants.grant(1, now) == {A: 1}


def test_demand_that_is_not_renewed_is_forgotten() -> None:
    grants = RoomGrants()
    grants.demand(A, since(1.0), 0, 1.0)
    grants.expire(1.0 + DEMAND_S)
    assert grants.waiting == 0 and grants.admits(B, 1)
    grants.expire(1000.0)
    assert not grants._entries


def test_a_long_list_is_cut() -> None:
    grants = RoomGrants()
    grants.demand(A, since(*range(1000)), 0, 1.0)
    assert grants.waiting == MAX_HEADS
