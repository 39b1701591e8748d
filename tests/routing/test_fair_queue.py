"""The order of waiting requests: arrival within a tenant, fair shares between tenants, priority and continued requests first."""

from random import Random

from routing.fair_queue import MAX_TENANTS, FairQueue, Ticket


def served(queue: FairQueue) -> list[Ticket]:
    order = []
    while (ticket := queue.head()) is not None:
        queue.take(ticket)
        order.append(ticket)
    return order


def queue_of(*tickets: Ticket) -> FairQueue:
    queue = FairQueue()
    for ticket in tickets:
        queue.push(ticket)
    return queue


def test_requests_of_one_tenant_are_served_in_order_of_arrival() -> None:
    tickets = [Ticket(number, 0.0, cost=1000.0 - number) for number in range(20)]
    assert served(queue_of(*tickets)) == tickets


def test_a_ticket_that_was_refused_takes_its_old_place() -> None:
    tickets = [Ticket(number, 0.0) for number in range(5)]
    queue = queue_of(*tickets)
    assert queue.take(tickets[0]) and queue.take(tickets[1])
    queue.push(tickets[1])
    queue.push(tickets[0])
    assert list(queue) == tickets and queue.head() == tickets[0]


def test_lower_priority_numbers_go_first_and_continued_requests_before_all() -> None:
    low, high = Ticket(0, 0.0, priority=5), Ticket(1, 0.0, priority=-5)
    continued = Ticket(2, 0.0, priority=9, continued=True)
    assert served(queue_of(low, high, continued)) == [continued, high, low]


def test_a_tenant_that_floods_the_queue_delays_itself_alone() -> None:
    flood = [Ticket(number, 0.0, tenant="flood", cost=100.0) for number in range(100)]
    modest = [Ticket(100 + number, 0.0, tenant=f"t{number}", cost=100.0) for number in range(10)]
    queue = queue_of(*flood, *modest)
    order = served(queue)
    assert all(order.index(ticket) <= 10 for ticket in modest)
    assert [ticket for ticket in order if ticket.tenant == "flood"] == flood


def test_cost_counts_in_the_shares_of_tenants() -> None:
    dear = [Ticket(number, 0.0, tenant="dear", cost=300.0) for number in range(10)]
    cheap = [Ticket(10 + number, 0.0, tenant="cheap", cost=100.0) for number in range(30)]
    first = served(queue_of(*dear, *cheap))[:20]
    assert sum(ticket.tenant == "cheap" for ticket in first) == 15


def test_an_idle_tenant_saves_no_share_for_later() -> None:
    queue = queue_of(*(Ticket(number, 0.0, tenant="busy", cost=10.0) for number in range(50)))
    for _ in range(40):
        head = queue.head()
        assert head is not None
        queue.take(head)
        queue.forget(head)
    for number in range(50, 60):
        queue.push(Ticket(number, 0.0, tenant="late", cost=10.0))
    tenants = [ticket.tenant for ticket in served(queue)[:10]]
    assert 4 <= tenants.count("late") <= 6


def test_how_many_are_ahead_depends_on_the_priority() -> None:
    queue = queue_of(*(Ticket(number, 0.0, priority=number % 3) for number in range(30)))
    assert [queue.ahead_of(priority) for priority in (-1, 0, 1, 2)] == [0, 10, 20, 30]
    last = queue.last()
    assert last is not None and last.priority == 2 and last.number == 29


def test_forgotten_tickets_leave_no_record() -> None:
    queue, rng = FairQueue(), Random(1)
    queue.push(Ticket(-1, 0.0, priority=9))
    for number in range(3000):
        ticket = Ticket(number, 0.0, tenant=str(rng.random()))
        queue.push(ticket)
        if number % 2:
            queue.take(ticket)
        queue.forget(ticket)
        assert not queue.take(ticket)
    assert len(queue) == len(queue._ranks) == 1 and len(queue._finish_tags) <= MAX_TENANTS + 1
