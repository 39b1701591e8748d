"""The order in which waiting requests are served: continued ones, then priority, then fair shares of tenants, then arrival.

Fair shares are those of start-time fair queueing (Goyal, Vin and Cheng, 1996): each request gets a start tag on arrival, which
grows for each tenant with the cost of the requests before it, and the smallest tag goes first. A tenant that floods the queue
delays itself; tenants that wait with one request each go round. Requests of one tenant and priority keep their order of arrival.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request (one choice of it) that waits for a path."""

    number: int  # in the order of arrival at this entry
    arrived_at: float
    priority: int = 0  # lower goes first
    tenant: str = ""
    cost: float = 1.0  # tokens to compute, any unit
    continued: bool = False  # its client has tokens already: it goes before all others

    @property
    def rank(self) -> tuple[bool, int, float, int]:
        """Its place among first tickets of other queues, where no shares are counted."""
        return (not self.continued, self.priority, self.arrived_at, self.number)


MAX_TENANTS = 1024  # without a waiting request, whose shares are still remembered

ServiceRank = tuple[bool, int, float, int]


class FairQueue:
    """Tickets in their order. A ticket that comes back after a refusal takes its old place."""

    def __init__(self) -> None:
        self._waiting: list[tuple[ServiceRank, Ticket]] = []
        self._ranks: dict[int, ServiceRank] = {}
        self._served_tag = 0.0  # the largest start tag that was served
        self._finish_tags: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Ticket]:
        """Yields the tickets in the order in which they will be served."""
        return (ticket for _, ticket in self._waiting)

    def push(self, ticket: Ticket) -> None:
        rank = self._ranks.get(ticket.number)
        if rank is not None:
            self.take(ticket)  # it may wait here already
        else:
            start_tag = max(self._served_tag, self._finish_tags.get(ticket.tenant, 0.0))
            self._finish_tags[ticket.tenant] = start_tag + ticket.cost
            rank = self._ranks[ticket.number] = (not ticket.continued, ticket.priority, start_tag, ticket.number)
        insort(self._waiting, (rank, ticket), key=lambda entry: entry[0])

    def head(self) -> Ticket | None:
        return self._waiting[0][1] if self._waiting else None

    def last(self) -> Ticket | None:
        """The ticket that is served last: of the lowest priority, and of these the newest of the greediest tenant."""
        return self._waiting[-1][1] if self._waiting else None

    def first(self, count: int) -> Sequence[Ticket]:
        return [ticket for _, ticket in self._waiting[:count]]

    def ahead_of(self, priority: int) -> int:
        """Returns how many tickets a new one of this priority would have before it, its tenant's share left aside."""
        return bisect_left(self._waiting, (True, priority + 1), key=lambda entry: entry[0][:2])

    def take(self, ticket: Ticket) -> bool:
        """Takes a ticket out; it may be pushed again and keeps its rank until `forget`. False: it does not wait here."""
        rank = self._ranks.get(ticket.number)
        if rank is None:
            return False
        at = bisect_left(self._waiting, rank, key=lambda entry: entry[0])
        if at == len(self._waiting) or self._waiting[at][0] != rank:
            return False
        del self._waiting[at]
        self._served_tag = max(self._served_tag, rank[2])
        return True

    def forget(self, ticket: Ticket) -> None:
        """The ticket does not come back. Shares are counted anew once the queue is empty."""
        self.take(ticket)
        self._ranks.pop(ticket.number, None)
        if not self._ranks:
            self._served_tag, self._finish_tags = 0.0, {}
        elif len(self._finish_tags) > MAX_TENANTS + len(self._ranks):
            here = {ticket.tenant for ticket in self}
            self._finish_tags = {tenant: tag for tenant, tag in self._finish_tags.items() if tenant in here}
