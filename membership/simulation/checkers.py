"""Checks of a simulated mesh that hold for any scenario."""

from __future__ import annotations

import math
from collections.abc import Iterable

from membership.simulation.network import Network
from mesh.ids import NodeId
from mesh.view import PeerState


def converged(network: Network) -> bool:
    """Every running node records exactly the running ones as alive, at the counts they claim; all fingerprints are equal."""
    up = {node: network.nodes[node].core for node in network.up}
    if len({core.fingerprint for core in up.values()}) > 1:
        return False
    for core in up.values():
        alive = {member.node for member in core.swim.members if member.state is PeerState.ALIVE}
        if alive != set(up):
            return False
        for node in alive:
            member, itself = core.swim.members[node], up[node].swim.myself
            if (member.epoch, member.incarnation, member.address) != (itself.epoch, itself.incarnation, itself.address):
                return False
    return True


def all_see(network: Network, node: NodeId, state: PeerState) -> bool:
    """Every other running node has `node` in this state."""
    return all(network.state(by, node) is state for by in network.up if by != node)


def deaths_of(network: Network, nodes: Iterable[NodeId], since: float = 0.0) -> list[tuple[float, NodeId, NodeId]]:
    """Returns (time, by, node) of each time a node recorded one of these nodes as dead."""
    wanted = set(nodes)
    fell = (s for s in network.seen if s.after is PeerState.DEAD and s.before is not PeerState.DEAD)
    return [(s.at, s.by, s.node) for s in fell if s.node in wanted and s.at >= since]


def detection_s(network: Network, node: NodeId, killed_at: float) -> list[float]:
    """Returns how long after its death each observer first recorded it as dead, ascending."""
    first: dict[NodeId, float] = {}
    for at, by, _ in deaths_of(network, [node], killed_at):
        first.setdefault(by, at - killed_at)
    return sorted(first.values())


def fallen_s(network: Network, node: NodeId, killed_at: float) -> list[float]:
    """Returns how long after its death each observer first recorded it as not alive, ascending."""
    first: dict[NodeId, float] = {}
    for seen in network.seen:
        if seen.node == node and seen.at >= killed_at and seen.after is not PeerState.ALIVE:
            first.setdefault(seen.by, seen.at - killed_at)
    return sorted(first.values())


def nobody_raises_anothers_incarnation(network: Network) -> bool:
    """No view holds counts of a running node that the node did not claim."""
    for by in network.up:
        for member in network.nodes[by].core.swim.members:
            itself = network.nodes[member.node].core.swim.myself
            if network.nodes[member.node].running and (member.epoch, member.incarnation) > (itself.epoch, itself.incarnation):
                return False
    return True


def overridden_goodbyes(network: Network) -> list[tuple[NodeId, NodeId]]:
    """Returns (by, node) where `by` recorded that `node` left, and later that the same or an earlier run of it died."""
    left: dict[tuple[NodeId, int, NodeId], int] = {}  # the epoch of the latest recorded departure
    found = []
    for seen in network.seen:
        key = (seen.by, seen.by_epoch, seen.node)
        if seen.after is PeerState.LEFT:
            left[key] = seen.epoch
        elif seen.after is PeerState.DEAD and seen.epoch <= left.get(key, -1):
            found.append((seen.by, seen.node))
    return found


def queues_are_bounded(network: Network) -> bool:
    """No node queues more rumours than there are members."""
    return all(len(it.core.swim.state.rumours) <= len(it.core.swim.members) for it in network.nodes.values())


def percentile(ordered: list[float], share: float) -> float:
    """Returns the quantile `share` of an ascending list; not a number for an empty one."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
