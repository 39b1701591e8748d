"""Which stores there are: a small map that every node holds whole. No I/O.

A store's entry is a pair of facts that only grow: its latest creation and its latest deletion. The store lives
while the first is later than the second, and its documents count only if written after the deletion. So two nodes
that create one store at the same time merge it, and a store that is deleted and made anew starts empty even where
an old replica comes back. Merging is a join: commutative, associative, idempotent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from mesh.errors import BadRequest
from mesh.ids import NodeId
from rag.clock import HybridTimestamp

FILES_ID = "files"
MAX_STORES = 1000  # entries, deleted ones included: every node holds and can send the whole map
MAX_NAME_CHARS = 200


class StoreEntry(msgspec.Struct, frozen=True, array_like=True):
    """One store. `embedder` names the vectors' space: passages of another space are refused."""

    id: str
    name: str
    created_at: int  # Unix seconds
    embedder: str
    hlc: int  # of the latest creation
    node: NodeId
    died: int = 0  # hlc of the latest deletion; 0: never

    @property
    def live(self) -> bool:
        return self.hlc > self.died


FILES = StoreEntry(FILES_ID, FILES_ID, 0, "", 1, NodeId(""))
"""The reserved store of uploaded files: not embedded, never deleted, known to all without gossip."""


def store_id(name: str) -> str:
    return "vs_" + hashlib.blake2b(name.encode(), digest_size=12).hexdigest()


def check_name(name: str) -> str:
    """The name if a store may bear it.

    Raises:
        BadRequest: empty, too long, or with characters that do not print.
    """
    if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise BadRequest(f"expected a store name of 1 to {MAX_NAME_CHARS} printable characters, got {len(name)}", "name")
    return name


def joined(left: StoreEntry, right: StoreEntry) -> StoreEntry:
    """Returns the entry with the knowledge of both."""
    latest = max(
        left, right, key=lambda entry: (HybridTimestamp(entry.hlc, entry.node), entry.name, entry.embedder, entry.created_at)
    )
    return msgspec.structs.replace(latest, died=max(left.died, right.died))


class Registry:
    def __init__(self, entries: Iterable[StoreEntry] = ()) -> None:
        self._entries: dict[str, StoreEntry] = {}
        for entry in entries:
            self.merge(entry)

    def news(self, entry: StoreEntry) -> StoreEntry | None:
        """The entry as it would be held after `merge`; None if that changes nothing, or the entry cannot be right."""
        if entry.id == FILES_ID or entry.id != store_id(entry.name):
            return None
        held = self._entries.get(entry.id)
        if held is None and len(self._entries) >= MAX_STORES:
            return None
        merged = entry if held is None else joined(held, entry)
        return None if merged == held else merged

    def merge(self, entry: StoreEntry) -> bool:
        """Takes in what an entry adds. True if it changed something."""
        merged = self.news(entry)
        if merged is None:
            return False
        self._entries[entry.id] = merged
        return True

    def get(self, identifier: str) -> StoreEntry | None:
        """By id alone, deleted ones too."""
        return FILES if identifier == FILES_ID else self._entries.get(identifier)

    def find(self, store: str) -> StoreEntry:
        """The live store with this id or name.

        Raises:
            BadRequest: there is none (404).
        """
        entry = self._entries.get(store) or self._entries.get(store_id(store))
        if entry is None or not entry.live:
            raise BadRequest(f"no store {store!r}; make one with: mesh docs add PATH --store NAME", "store", "not_found", 404)
        return entry

    def entries(self) -> list[StoreEntry]:
        return [self._entries[identifier] for identifier in sorted(self._entries)]

    def live(self) -> list[StoreEntry]:
        return [entry for entry in self.entries() if entry.live]
