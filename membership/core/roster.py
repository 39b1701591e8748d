"""The live members in the order of ids: one immutable list, and one more for each list with a node more or fewer.

Each list refers to the lists with, and without, a node. So all simulated nodes with the same members share one list, in whatever
order their members changed: a mesh of ten thousand simulated nodes holds a few lists and not ten thousand copies, and a probe
round keeps the list that it began with at no cost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from mesh.ids import NodeId

if TYPE_CHECKING:
    from random import Random


class MemberIds:
    """An immutable set of node ids. `ids`: ascending, each once."""

    __slots__ = ("__weakref__", "_next", "ids")

    def __init__(self, ids: Iterable[NodeId] = ()) -> None:
        self.ids = tuple(sorted(set(ids)))
        self._next: WeakValueDictionary[NodeId, MemberIds] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, node: NodeId) -> bool:
        at = bisect_left(self.ids, node)
        return at < len(self.ids) and self.ids[at] == node

    def having(self, node: NodeId) -> MemberIds:
        """Returns the list with `node`."""
        return self if node in self else self._other(node)

    def lacking(self, node: NodeId) -> MemberIds:
        """Returns the list without `node`."""
        return self._other(node) if node in self else self

    def _other(self, node: NodeId) -> MemberIds:
        """Returns the list that differs from this one in `node` alone."""
        other = self._next.get(node)
        if other is None:
            at = bisect_left(self.ids, node)
            held = at < len(self.ids) and self.ids[at] == node
            other = MemberIds()
            other.ids = self.ids[:at] + (() if held else (node,)) + self.ids[at + held :]
            self._next[node] = other
            other._next[node] = self
        return other

    def after(self, node: NodeId, count: int) -> list[NodeId]:
        """Up to `count` ids that follow `node`, which is here, as if the last were followed by the first; never `node` itself."""
        start, length = bisect_left(self.ids, node) + 1, len(self.ids)
        return [self.ids[(start + step) % length] for step in range(min(count, length - 1))]


def some_of(rosters: Sequence[MemberIds], count: int, rng: Random, without: tuple[NodeId, ...]) -> list[NodeId]:
    """Up to `count` different ids of all these lists, which share none, uniformly at random, none of `without`."""
    total = sum(len(roster) for roster in rosters)
    if total <= 2 * (count + len(without)):
        left = [node for roster in rosters for node in roster.ids if node not in without]
        return rng.sample(left, min(count, len(left)))
    drawn: list[NodeId] = []
    while len(drawn) < count:  # each draw hits with a chance of a half and more
        at = int(rng.random() * total)
        for roster in rosters:
            if at < len(roster):
                break
            at -= len(roster)
        node = roster.ids[at]
        if node not in without and node not in drawn:
            drawn.append(node)
    return drawn
