"""Waiting requests are placed in order as room is granted; nothing is polled, nothing waits for ever."""

from __future__ import annotations

from mesh.ids import NodeId
from routing.entry_queue import CREDIT_S, OPENS_AT_ONCE, PROBE_S, RENEW_S, EntryQueue
from routing.fair_queue import Ticket

A, B = NodeId("a"), NodeId("b")
LANE = ("m", "w")


class Placing:
    """Stands in for routing: places on the first of `nodes` that is not full."""

    def __init__(self, *nodes: NodeId) -> None:
        self.nodes = nodes
        self.placed: list[tuple[int, NodeId]] = []
        self.asked = 0

    def __call__(self, ticket: Ticket, without: frozenset[NodeId]) -> tuple[NodeId, ...] | None:
        self.asked += 1
        for node in self.nodes:
            if node not in without:
                self.placed.append((ticket.number, node))
                return (node,)
        return None

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.placed]


def tickets(count: int, first: int = 0) -> list[Ticket]:
    return [Ticket(first + number, 0.0) for number in range(count)]


def refuse(queue: EntryQueue, ticket: Ticket, node: NodeId, now: float) -> None:
    queue.refused(ticket, node, now)
    queue.join(ticket, LANE, now)


def full_queue(count: int = 5) -> tuple[EntryQueue, Placing, list[Ticket]]:
    """One node that refused the first of `count` requests; all wait."""
    placing = Placing(A)
    queue = EntryQueue(placing)
    waiting = tickets(count)
    queue.join(waiting[0], LANE, 0.0)
    refuse(queue, waiting[0], A, 0.0)
    for ticket in waiting[1:]:
        queue.join(ticket, LANE, 0.0)
    assert len(queue) == count and queue.full_nodes() == {A}
    return queue, placing, waiting


def test_a_request_goes_out_at_once_where_nothing_is_full() -> None:
    placing = Placing(A)
    queue = EntryQueue(placing)
    [ticket] = tickets(1)
    queue.join(ticket, LANE, 0.0)
    assert placing.placed == [(0, A)] and len(queue) == 0
    queue.opened(ticket, 0.1)
    assert queue.due_demands(1.0) == []


def test_a_refused_request_goes_elsewhere_at_once() -> None:
    placing = Placing(A, B)
    queue = EntryQueue(placing)
    [ticket] = tickets(1)
    queue.join(ticket, LANE, 0.0)
    refuse(queue, ticket, A, 0.1)
    assert placing.placed == [(0, A), (0, B)]


def test_a_ticket_is_not_sent_round_between_full_nodes() -> None:
    placing = Placing(A, B)
    queue = EntryQueue(placing)
    [ticket] = tickets(1)
    queue.join(ticket, LANE, 0.0)
    refuse(queue, ticket, A, 0.1)
    assert [demand.heads for demand in queue.due_demands(0.15)] == [()], "nothing waits while it is being opened at B"
    refuse(queue, ticket, B, 0.2)
    assert placing.placed == [(0, A), (0, B)] and queue.full_nodes() == {A, B}
    assert {demand.node: demand.heads for demand in queue.due_demands(0.3)} == {A: (ticket,), B: (ticket,)}


def test_with_all_full_requests_wait_in_order_and_are_not_tried_again() -> None:
    queue, placing, waiting = full_queue()
    asked = placing.asked
    for tenth in range(1, 40):
        queue.tick(tenth / 10)
    assert placing.numbers == [0] and placing.asked == asked
    queue.granted(A, "m", 2, 4.0)
    assert placing.numbers == [0, 0, 1]
    refuse(queue, waiting[0], A, 4.1)
    queue.granted(A, "m", 3, 4.2)
    assert placing.numbers == [0, 0, 1, 0, 2, 3]


def test_a_late_request_does_not_overtake() -> None:
    queue, placing, _ = full_queue(2)
    queue.join(Ticket(9, 0.0), LANE, 0.0)
    queue.granted(A, "m", 1, 1.0)
    assert placing.numbers == [0, 0]
    queue.join(Ticket(10, 1.0, priority=-1), LANE, 0.0)
    queue.granted(A, "m", 1, 2.0)
    assert placing.numbers == [0, 0, 10]


def test_demand_is_sent_once_and_again_each_second_and_withdrawn_at_the_end() -> None:
    queue, placing, waiting = full_queue(3)
    [demand] = queue.due_demands(0.0)
    assert (demand.node, demand.model, demand.heads) == (A, "m", tuple(waiting))
    assert queue.due_demands(0.5) == []
    assert queue.deadline <= RENEW_S
    assert len(queue.due_demands(RENEW_S)) == 1
    queue.granted(A, "m", 3, 1.5)
    assert placing.numbers == [0, 0, 1, 2]
    for ticket in waiting:
        queue.opened(ticket, 1.6)
    [demand] = queue.due_demands(1.7)
    assert demand.heads == () and demand.received_total == 3
    assert queue.due_demands(9.0) == [] and queue.full_nodes() == set()


def test_a_grant_that_cannot_be_used_in_time_is_dropped() -> None:
    placing = Placing()
    queue = EntryQueue(placing)
    [ticket] = tickets(1)
    queue.join(ticket, LANE, 0.0)
    placing.nodes = (A,)
    queue.view_changed(0.0)
    refuse(queue, ticket, A, 0.0)
    placing.nodes = ()  # another stage of the path is missing
    queue.granted(A, "m", 1, 1.0)
    queue.tick(1.0 + CREDIT_S)
    placing.nodes = (A,)
    queue.view_changed(0.0)
    assert placing.numbers == [0]


def test_a_full_node_that_grants_nothing_is_probed_with_one_request() -> None:
    queue, placing, waiting = full_queue(4)
    assert queue.deadline <= PROBE_S
    queue.tick(PROBE_S)
    assert placing.numbers == [0, 0]
    refuse(queue, waiting[0], A, PROBE_S + 0.1)
    queue.tick(2 * PROBE_S)
    assert placing.numbers == [0, 0]
    queue.tick(2 * PROBE_S + 0.2)
    assert placing.numbers == [0, 0, 0]


def test_a_node_that_restarted_is_asked_at_once() -> None:
    queue, placing, _ = full_queue(4)
    queue.node_gone(A, 1.0)
    assert placing.numbers == [0, 0, 1, 2, 3]


def test_a_cancelled_request_makes_room_for_the_next() -> None:
    queue, placing, waiting = full_queue(3)
    queue.leave(waiting[0], 0.0)
    queue.leave(waiting[0], 0.0)
    queue.granted(A, "m", 1, 1.0)
    assert placing.numbers == [0, 1]


def test_a_burst_is_not_sent_out_before_the_first_answers() -> None:
    placing = Placing(A)
    queue = EntryQueue(placing)
    burst = tickets(OPENS_AT_ONCE + 10)
    for ticket in burst:
        queue.join(ticket, LANE, 0.0)
    assert len(placing.placed) == OPENS_AT_ONCE
    queue.opened(burst[0], 0.1)
    assert len(placing.placed) == OPENS_AT_ONCE + 1


def test_lanes_of_other_models_are_not_held_up() -> None:
    queue, placing, _ = full_queue(3)
    queue.join(Ticket(7, 0.0), ("other", "w"), 0.0)
    assert placing.numbers == [0, 7]


def test_lanes_of_one_model_share_its_grants_by_age_and_continued_requests_go_first() -> None:
    placing = Placing(A)
    queue = EntryQueue(placing)
    first, *others = (Ticket(number, float(number)) for number in range(5))
    queue.join(first, LANE, 0.0)
    refuse(queue, first, A, 0.0)
    for ticket in others:
        queue.join(ticket, (*LANE, "numerics") if ticket.number % 2 else LANE, 0.0)
    queue.join(Ticket(9, 9.0, continued=True), (*LANE, "numerics"), 0.0)
    queue.granted(A, "m", 6, 1.0)
    assert placing.numbers == [0, 9, 0, 1, 2, 3, 4]


def test_a_request_that_needs_no_path_any_more_holds_up_nobody() -> None:
    queue = EntryQueue(lambda ticket, without: () if ticket.number == 0 else None if without else (A,))
    first, second = tickets(2)
    queue.join(first, LANE, 0.0)
    queue.join(second, LANE, 0.0)
    assert len(queue) == 0
    queue.leave(first, 0.0)
    queue.opened(second, 0.0)
    assert queue.due_demands(10.0) == []


def test_the_expected_wait_is_that_of_those_ahead_at_the_rate_of_starts() -> None:
    queue, _, waiting = full_queue(40)
    queue.granted(A, "m", 20, 1.0)
    for ticket in waiting[:20]:
        queue.opened(ticket, 5.0)
    assert queue.expected_wait_s(LANE, 0, 6.0) == 4.0, "a queue that has just begun to move is measured over four seconds"
    assert queue.expected_wait_s(LANE, 0, 13.0) == 8.0
    assert queue.expected_wait_s(LANE, -1, 6.0) == 0.0
    assert queue.expected_wait_s(("other", "w"), 0, 6.0) == 0.0
