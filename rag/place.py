"""Which nodes own a shard and which are asked for it: pure functions of the view.

Owners are the top R of rendezvous hashing over the roster. The roster is not the list of live nodes: one that died
a moment ago stays in it for a grace period, so that a restart or a long pause moves no data. Nodes may disagree on
the roster for a while: harmless, as any node takes any write and merging does not depend on order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mesh import rendezvous
from mesh.ids import NodeId
from mesh.view import PeerState, View

REPLICAS = 3
WRITE_QUORUM = 2
DEAD_GRACE_S = 600.0


def roster(view: View, dead_since: Mapping[NodeId, float], now_s: float, grace_s: float = DEAD_GRACE_S) -> list[NodeId]:
    """Nodes that may own shards: live and suspect ones, and those dead for less than `grace_s`. Leavers are out at once."""
    nodes = [peer.id for peer in view.live()]
    for peer in view.peers.values():
        if peer.state is PeerState.DEAD and now_s - dead_since.get(peer.id, now_s) < grace_s:
            nodes.append(peer.id)
    return sorted(nodes)


def ranking(store: str, shard: int, nodes: Iterable[NodeId]) -> list[NodeId]:
    """All nodes by their claim on the shard, best first: the first `REPLICAS` own it, the others stand in, in this order."""
    members = list(nodes)
    return rendezvous.owners(f"documents/{store}/{shard}".encode(), members, len(members))


def owners(store: str, shard: int, nodes: Iterable[NodeId]) -> list[NodeId]:
    return ranking(store, shard, nodes)[:REPLICAS]


def cover(candidates: Mapping[int, Sequence[NodeId]], me: NodeId) -> dict[NodeId, list[int]]:
    """Which node to ask for which shards: few nodes, this one first, and no shard twice.

    Greedy set cover; ties go to the node that stands earlier among the candidates, then to the lower id.
    Shards without candidates are left out.
    """
    plan: dict[NodeId, list[int]] = {}
    left = {shard: list(nodes) for shard, nodes in candidates.items() if nodes}
    while left:
        claims: dict[NodeId, list[int]] = {}
        place: dict[NodeId, int] = {}
        for shard, nodes in left.items():
            for position, node in enumerate(nodes):
                claims.setdefault(node, []).append(shard)
                place[node] = place.get(node, 0) + position
        best = min(claims, key=lambda node: (node != me, -len(claims[node]), place[node], node))
        plan[best] = sorted(claims[best])
        for shard in claims[best]:
            del left[shard]
    return plan
