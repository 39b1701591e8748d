"""What comes of asking several nodes: a node's part of an answer, and what was reported of single documents. No I/O."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from mesh.ids import NodeId
from rag import place
from rag.replica import DocumentHead

A = TypeVar("A")


class ShardReply(Generic[A]):
    """One node's answer, and the shards it is good for: those asked less those in which it reports itself behind."""

    def __init__(self, answer: A, shards: Iterable[int]) -> None:
        self.answer = answer
        self.shards = list(shards)


Ask = Callable[[NodeId, list[int], bool], Awaitable[ShardReply[A]]]
"""Asks a node for shards; the flag lets it answer for those it is behind in too."""


@dataclass(slots=True)
class HeadsFound:
    """What was found of some (store id, document id), and which owners have answered for it."""

    latest: dict[tuple[str, str], DocumentHead]
    answered: dict[tuple[str, str], set[NodeId]]
    owners: dict[tuple[str, str], set[NodeId]]

    def take(self, node: NodeId, item: tuple[str, str], head: DocumentHead | None) -> None:
        self.answered[item].add(node)
        if head is not None and (item not in self.latest or head.stamp > self.latest[item].stamp):
            self.latest[item] = head

    def get(self, store: str, doc_id: str) -> DocumentHead | None:
        return self.latest.get((store, doc_id))

    @property
    def certain(self) -> bool:
        """Whether no write that stood can have been missed: a read quorum meets every write quorum."""
        return all(
            len(owners & self.answered[item]) > len(owners) - min(place.WRITE_QUORUM, len(owners))
            for item, owners in self.owners.items()
        )

    @property
    def complete(self) -> bool:
        """Whether every owner answered, so that not even a write that failed half-way can have been missed."""
        return all(owners <= self.answered[item] for item, owners in self.owners.items())
