"""Rendezvous hashing: every node computes the same owners of a key from the list of nodes alone.

Highest random weight (Thaler & Ravishankar 1998), in its weighted form `-w / ln(u)`: removing a node
moves only the keys it owned, and a node of weight 2 owns twice as many as one of weight 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

from mesh.ids import NodeId


def score(key: bytes, node: NodeId, weight: float = 1.0) -> float:
    """Returns the node's score for the key; the highest scores own it. The bits are the same on every machine."""
    digest = hashlib.blake2b(key + b"\0" + node.encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 0.5) / 2.0**64  # strictly inside (0, 1)
    return -weight / math.log(uniform)


def owners(key: bytes, nodes: Iterable[NodeId], count: int, weights: Mapping[NodeId, float] | None = None) -> list[NodeId]:
    """Returns the `count` nodes with the highest scores for `key`, best first; fewer when there are fewer nodes."""
    weights = weights or {}
    ranked = sorted(nodes, key=lambda node: (-score(key, node, weights.get(node, 1.0)), node))
    return ranked[:count]
