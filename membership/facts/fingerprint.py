"""Fingerprint of the live members: eight bytes that are equal on two nodes with the same records of them.

The exclusive or of one hash per live member, so a change costs two hashes, whatever the size of the mesh. It covers
incarnations too: a refutation that got lost is repaired by the same exchange as a lost facts record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

from mesh.ids import NodeId

FactsPrecedence = tuple[int, int]
"""(epoch, incarnation)."""


class Fingerprint:
    def __init__(self, standings: Mapping[NodeId, FactsPrecedence] | None = None) -> None:
        """`standings`: of the live members."""
        self._common: Mapping[NodeId, FactsPrecedence] = {}
        self._standing: dict[NodeId, FactsPrecedence | None] = {}  # beyond the common ones; None: not alive
        self._facts: dict[NodeId, tuple[int, int]] = {}  # of all nodes with facts: epoch, version
        self.value = 0
        for node, standing in (standings or {}).items():
            self.live(node, *standing)

    def found(self, standings: Mapping[NodeId, FactsPrecedence], value: int) -> None:
        """Starts with these live members, sharing their entries until one changes. `value`: their fingerprint."""
        self._standing.clear()
        self._common, self.value = standings, value

    def live(self, node: NodeId, epoch: int, incarnation: int) -> None:
        self._swap(node, (epoch, incarnation), self._facts.get(node))

    def gone(self, node: NodeId) -> None:
        self._swap(node, None, self._facts.get(node))

    def facts(self, node: NodeId, epoch: int, version: int) -> None:
        self._swap(node, self._of(node), (epoch, version))

    def forget(self, node: NodeId) -> None:
        self._swap(node, None, None)

    def _of(self, node: NodeId) -> FactsPrecedence | None:
        return self._standing[node] if node in self._standing else self._common.get(node)

    def _swap(self, node: NodeId, standing: FactsPrecedence | None, facts: tuple[int, int] | None) -> None:
        self.value ^= _hash_of(node, self._of(node), self._facts.pop(node, None))
        self.value ^= _hash_of(node, standing, facts)
        if standing == self._common.get(node):
            self._standing.pop(node, None)
        else:
            self._standing[node] = standing
        if facts is not None:
            self._facts[node] = facts


@lru_cache(maxsize=65_536)
def _hash_of(node: NodeId, standing: tuple[int, int] | None, facts: tuple[int, int] | None) -> int:
    """Returns one member's hash; 0 if it is not alive. Facts of an earlier run are not included."""
    if standing is None:
        return 0
    version = facts[1] if facts is not None and facts[0] == standing[0] else 0
    text = f"{node} {standing[0]} {standing[1]} {version}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
