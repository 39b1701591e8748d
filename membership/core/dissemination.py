"""Selects the claims that the next message carries: each a bounded number of times, the least sent first.

A claim about a node replaces an older one about the same node, so the queue holds one claim a member and
cannot outgrow the member table. Eager copies of fresh news are not counted here: in a small mesh they would use
the whole budget up and leave a member uninformed.
Source: SWIM, section 4.1; the order is memberlist's `TransmitLimitedQueue`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.ids import NodeId
from mesh.wire.datagram_codec import claim_bytes
from mesh.wire.gossip import Claim

_MAX_FLOOR = 20


def transmit_limit(multiplier: int, live: int) -> int:
    """How often one claim is sent: `multiplier` * ceil(log10(n + 1)), but at least 2 * ceil(log2(n)) + 4.

    The floor is for small meshes, where the formula alone has been seen to miss members; it ends at 20 copies from each
    node, which together miss a given member with a probability of e^-20.
    Source: memberlist's `retransmitLimit`; the floor from our own simulations.
    """
    scaled = multiplier * math.ceil(math.log10(live + 1))
    floor = min(_MAX_FLOOR, 2 * math.ceil(math.log2(max(2, live))) + 4)
    return max(scaled, floor)


@dataclass(slots=True)
class Rumour:
    claim: Claim
    size_bytes: int
    sent: int
    number: int  # order of arrival; newer first among equals


class Rumours:
    """The claims a node still passes on."""

    def __init__(self) -> None:
        self.by_node: dict[NodeId, Rumour] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.by_node)

    def put(self, claim: Claim) -> None:
        """Queues `claim`, in place of an earlier claim about the same node."""
        self._arrivals += 1
        self.by_node[claim.node] = Rumour(claim, len(claim_bytes(claim)), 0, self._arrivals)

    def forget(self, node: NodeId) -> None:
        self.by_node.pop(node, None)

    def take(self, budget_bytes: int, limit: int, first: Iterable[Claim] = ()) -> tuple[Claim, ...]:
        """Claims for one message: `first`, which are not counted, then the least sent, within `budget_bytes`.

        Drops a rumour once it was taken `limit` times.
        """
        taken: list[Claim] = []
        about: set[NodeId] = set()
        for claim in first:
            size_bytes = len(claim_bytes(claim))
            if size_bytes <= budget_bytes and claim.node not in about:
                taken.append(claim)
                about.add(claim.node)
                budget_bytes -= size_bytes
        for rumour in sorted(self.by_node.values(), key=lambda rumour: (rumour.sent, -rumour.number)):
            if rumour.size_bytes > budget_bytes or rumour.claim.node in about:
                continue
            taken.append(rumour.claim)
            budget_bytes -= rumour.size_bytes
            rumour.sent += 1
            if rumour.sent >= limit:
                del self.by_node[rumour.claim.node]
        return tuple(taken)
