"""Latencies between simulated nodes, blocked routes, and the bytes sent between regions."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from mesh.ids import NodeId

TimeSpan = tuple[float, float]
"""(shortest, longest), in seconds."""


class LatencyModel:
    """Draws latencies uniformly: `near_s` of one way within a region, `far_s` between two."""

    def __init__(self, rng: Random, near_s: TimeSpan, far_s: TimeSpan | None) -> None:
        self._rng = rng
        self._near_s, self._far_s = near_s, far_s or near_s
        self._region: dict[NodeId, str] = {}
        self._regions: set[str] = set()
        self._blocked: set[tuple[NodeId, NodeId]] = set()
        self.bytes_abroad = 0

    def place(self, node: NodeId, region: str) -> None:
        self._region[node] = region
        self._regions.add(region)

    def abroad(self, one: NodeId, other: NodeId) -> bool:
        return len(self._regions) > 1 and self._region.get(one) != self._region.get(other)

    def delay_s(self, one: NodeId, other: NodeId) -> float:
        shortest_s, longest_s = self._far_s if self.abroad(one, other) else self._near_s
        return shortest_s + (longest_s - shortest_s) * self._rng.random()

    def passes(self, source: NodeId, to: NodeId) -> bool:
        return not self._blocked or (source, to) not in self._blocked

    def carried(self, source: NodeId, to: NodeId, size_bytes: int) -> None:
        if self.abroad(source, to):
            self.bytes_abroad += size_bytes

    def cut(self, some: Iterable[NodeId], others: Iterable[NodeId], *, one_way: bool) -> None:
        """Blocks all messages from `some` to `others`, and back unless `one_way`."""
        others = list(others)
        for one in some:
            for other in others:
                self._blocked.add((one, other))
                if not one_way:
                    self._blocked.add((other, one))

    def heal(self) -> None:
        self._blocked.clear()
