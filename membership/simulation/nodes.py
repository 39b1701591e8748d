"""A node of a simulated mesh, and the record of each change in a node's view."""

from __future__ import annotations

from dataclasses import dataclass, field

from membership.core.core import MembershipCore
from mesh.ids import Address, NodeId
from mesh.view import PeerState
from mesh.wire.gossip import GossipMessage

Carried = bytes | GossipMessage
"""A datagram under way."""


@dataclass(slots=True)
class SimNode:
    id: NodeId
    address: Address
    core: MembershipCore
    epoch: int
    started_at: float
    running: bool = True
    paused: bool = False
    buffer: list[tuple[Address, Carried]] = field(default_factory=list)
    due_at: float = float("inf")  # its core's deadline after the last input
    armed_for: float = float("inf")
    bytes_sent: int = 0
    datagrams_sent: int = 0
    links: set[NodeId] = field(default_factory=set)  # open with these, in either direction
    starved_s: tuple[float, float] | None = (
        None  # range of the delay with which it reads inputs, in order; its timers fire on time
    )
    read_until: float = 0.0
    refuses: bool = False  # dead, but its host is up and refuses connections
    refuses_all: bool = False  # alive behind a firewall that resets incoming TCP connections


@dataclass(frozen=True, slots=True)
class ObservedChange:
    """One change in one node's view."""

    at: float
    by: NodeId
    node: NodeId
    before: PeerState | None
    after: PeerState
    restarted: bool
    cause: str
    incarnation: int = 0  # of `node`, as `by` recorded it then
    runs: bool = False  # the run of `node` to which the change refers was running then
    epoch: int = 0  # of `node`, as `by` recorded it then
    by_epoch: int = 0  # which run of `by` it was

    @classmethod
    def of(
        cls,
        at: float,
        by: SimNode,
        meant: SimNode | None,
        node: NodeId,
        before: PeerState | None,
        after: PeerState,
        restarted: bool,
    ) -> ObservedChange:
        """`meant`: the node as it really is."""
        member = by.core.swim.members.get(node)
        if member is None:
            return cls(at, by.id, node, before, after, restarted, "")
        runs = meant is not None and meant.running and meant.core.swim.myself.epoch == member.epoch
        return cls(at, by.id, node, before, after, restarted, member.cause, member.incarnation, runs, member.epoch, by.epoch)
