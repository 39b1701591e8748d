"""How a stage that is full shares the room that it frees: credit-based flow control between it and all entries.

An entry whose open was refused sends its demand: the first of its waiting requests. Whenever a sequence ends, the stage grants
the room to the request that has waited longest over all entries, whoever holds its connection: an entry with many waiting
requests gets more room than one with few, and no request overtakes an older one of its priority. A grant reserves one place
for a short time; one that is not used by then goes to the next. Opens without a grant are refused while others wait.

This is a core: times come in as arguments, frames go out in the shell (`node.serving.stages`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh.ids import NodeId

GRANT_S = 2.0  # a reserved place that is not taken by then goes to the next
DEMAND_S = 5.0  # demand that is not renewed counts no longer: its entry sends it each second
FORGET_S = 60.0  # an entry that needed no room for so long is counted anew
MAX_HEADS = 64  # waiting requests that one demand lists; grants follow more quickly than a new demand


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """What a stage needs to compare one entry's waiting request with another's."""

    continued: bool
    priority: int
    since: float  # on the clock of who holds this


@dataclass(slots=True)
class _Entry:
    heads: list[WaitingRequest] = field(default_factory=list)
    demand_until: float = -math.inf
    reserved_until: list[float] = field(default_factory=list)  # one for each grant that is out, oldest first
    granted_total: int = 0


class RoomGrants:
    """The room of one model on one node. `room` in calls: places that no sequence holds now."""

    def __init__(self) -> None:
        self._entries: dict[NodeId, _Entry] = {}

    @property
    def reserved(self) -> int:
        return sum(len(entry.reserved_until) for entry in self._entries.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for room here, as far as their entries listed them."""
        return sum(len(entry.heads) for entry in self._entries.values())

    @property
    def deadline(self) -> float:
        """When `expire` next has something to do."""
        ends = [entry.reserved_until[0] for entry in self._entries.values() if entry.reserved_until]
        return min([*ends, *(entry.demand_until for entry in self._entries.values() if entry.heads)], default=math.inf)

    def demand(self, node: NodeId, heads: Sequence[WaitingRequest], received_total: int, now: float) -> None:
        """Replaces what is known of the entry's waiting requests, in its order; none: it gives its grants back.

        received_total: grants that the entry had received when it sent this. Those on their way are for the first of `heads`;
        lost ones count no longer once their time is over.
        """
        entry = self._entries.setdefault(node, _Entry())
        entry.granted_total = max(entry.granted_total, received_total)
        on_the_way = min(entry.granted_total - received_total, len(entry.reserved_until))
        entry.heads = list(heads[on_the_way : on_the_way + MAX_HEADS])
        entry.demand_until = now + DEMAND_S
        if not heads:
            entry.reserved_until, entry.granted_total = [], 0  # the entry counts from 0 when it needs room again

    def forget(self, node: NodeId) -> None:
        """The entry is gone."""
        self._entries.pop(node, None)

    def admits(self, node: NodeId, room: int) -> bool:
        """Whether an open of the entry may take a place; uses up its oldest grant. Without one it must find room that is
        neither reserved nor waited for."""
        entry = self._entries.get(node)
        if room < 1:
            return False
        if entry is not None and entry.reserved_until:
            del entry.reserved_until[0]
            return True
        return room > self.reserved and not self.waiting

    def grant(self, room: int, now: float) -> dict[NodeId, int]:
        """Reserves the places that are free for the requests that waited longest; returns how many each entry gets."""
        self.expire(now)
        granted: dict[NodeId, int] = {}
        places = room - self.reserved
        while places > 0:
            waiting = [(_rank(entry.heads[0]), node) for node, entry in self._entries.items() if entry.heads]
            if not waiting:
                break
            _, node = min(waiting)
            entry = self._entries[node]
            del entry.heads[0]
            entry.reserved_until.append(now + GRANT_S)
            entry.granted_total += 1
            granted[node] = granted.get(node, 0) + 1
            places -= 1
        return granted

    def expire(self, now: float) -> None:
        """Takes back places that were not taken in time, and forgets demand that was not renewed."""
        for node, entry in list(self._entries.items()):
            entry.reserved_until = [until for until in entry.reserved_until if until > now]
            if entry.demand_until <= now:
                entry.heads = []
            if entry.demand_until + FORGET_S <= now and not entry.reserved_until:
                del self._entries[node]


def _rank(request: WaitingRequest) -> tuple[bool, int, float]:
    return (not request.continued, request.priority, request.since)
