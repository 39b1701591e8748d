"""One owner's replicated map: keys with versions, deltas in version order, deletions that are collected safely.

Only the owner writes, each write with the next version. A copy at version v holds of every key the newest write up to v,
so what it lacks is exactly what was written after v: a delta is those writes in order, and one that is cut off anywhere
leaves a copy at a lower version and no gap. A deleted key stays as a tombstone. The owner drops old tombstones
and publishes up to which version (`collected`); a copy older than that may hold keys whose deletion can no longer be sent to
it, so it gets the map from the start, up to `collected` in one piece, and forgets what it had.
Source: Scuttlebutt (van Renesse et al., LADIS 2008); the reset rule closes its hole with deletions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import takewhile

from mesh.errors import LocalError
from mesh.ids import NodeId
from mesh.wire.sync import (
    DELTA_BYTES,
    ENTRY_BYTES,
    MAX_KEY_CHARS,
    MAX_OWNER_BYTES,
    MAX_OWNER_KEYS,
    FactsDelta,
    FactsEntry,
    Known,
    entry_bytes,
    is_sound,
)

TOMBSTONES_KEPT = 256  # of one owner; the older half goes when there are more
TOLERATED = 4  # times the owner's bound: an incomplete copy may hold old values beside new ones


class DeltaOutcome(Enum):
    NEWS = "news"
    KNOWN = "known"
    GAP = "gap"  # writes before it are missing here: ask for them
    REFUSED = "refused"  # it breaks the rules of a map


class OwnerMap:
    """A copy of one owner's map, or the owner's own."""

    def __init__(self, owner: NodeId, epoch: int) -> None:
        self.owner = owner
        self.epoch = epoch
        self.version = 0
        self.collected = 0
        self.size_bytes = 0
        self.overgrown = False  # its owner exceeded the bounds: it is not shown until the owner restarts
        self._entries: dict[str, FactsEntry] = {}  # in version order

    @property
    def known(self) -> Known:
        return self.epoch, self.version

    @property
    def tombstones(self) -> int:
        return sum(entry.value is None for entry in self._entries.values())

    def live(self) -> dict[str, bytes]:
        """Returns the current keys and values."""
        return {entry.key: entry.value for entry in self._entries.values() if entry.value is not None}

    def __len__(self) -> int:
        return len(self._entries)

    # the owner's side

    def write(self, wanted: Mapping[str, bytes]) -> dict[str, bytes | None]:
        """Replaces the content of the map; returns the changes, None for a deleted key. Deletions come first, so that a copy
        that is cut off never holds more than before and after together.

        Raises:
            LocalError: it is larger than peers accept. Nothing is changed.
        """
        live = self.live()
        changes: dict[str, bytes | None] = {key: None for key in live if key not in wanted}
        changes |= {key: value for key, value in wanted.items() if live.get(key) != value}
        size_bytes = sum(ENTRY_BYTES + len(key.encode()) + len(value) for key, value in wanted.items())
        if size_bytes > MAX_OWNER_BYTES or len(wanted) > MAX_OWNER_KEYS or any(len(key) > MAX_KEY_CHARS for key in wanted):
            raise LocalError(
                f"the facts of one node may take {MAX_OWNER_BYTES} bytes in {MAX_OWNER_KEYS} keys, "
                f"a key {MAX_KEY_CHARS} characters; these take {size_bytes} in {len(wanted)}"
            )
        for key, value in changes.items():
            self._put(FactsEntry(key, self.version + 1, value))
        if self.tombstones > TOMBSTONES_KEPT:
            dead = [entry for entry in self._entries.values() if entry.value is None]
            self._collect(dead[len(dead) // 2].version)
        return changes

    def outbid(self, version: int) -> None:
        """A copy holds versions never written, up to `version`: all keys are rewritten above it, older copies start over."""
        live = self.live()
        self._entries, self.size_bytes = {}, 0
        self.version = max(self.version, version)
        self.collected = self.version + 1
        for key, value in live.items():
            self._put(FactsEntry(key, self.version + 1, value))
        self.version = max(self.version, self.collected)

    def renew(self, epoch: int) -> None:
        """Moves the map to another epoch of its owner, with all its writes."""
        self.epoch = epoch

    # the copies' side

    def apply(self, delta: FactsDelta) -> tuple[DeltaOutcome, dict[str, bytes | None]]:
        """Applies a delta of this epoch; returns the outcome and the changed keys."""
        if not is_sound(delta):
            return DeltaOutcome.REFUSED, {}
        if self.overgrown or delta.upto <= self.version:
            return DeltaOutcome.KNOWN, {}
        if delta.since > self.version or (delta.since and delta.collected > self.version):
            return DeltaOutcome.GAP, {}
        before: dict[str, bytes] = {}
        if delta.collected > self.version:  # the copy starts over
            before, self._entries, self.size_bytes, self.version = self.live(), {}, 0, 0
        changes: dict[str, bytes | None] = dict.fromkeys(before)
        for entry in delta.entries:
            if entry.version > self.version:
                self._put(entry)
                changes[entry.key] = entry.value
        self.version = delta.upto
        self._collect(max(self.collected, delta.collected))
        if self.size_bytes > TOLERATED * MAX_OWNER_BYTES or len(self) > TOLERATED * MAX_OWNER_KEYS:
            changes = dict.fromkeys([*self.live(), *before])
            self._entries, self.size_bytes, self.overgrown = {}, 0, True
        return DeltaOutcome.NEWS, changes

    def differs(self, delta: FactsDelta) -> bool:
        """Returns whether the delta differs from this map. For the owner, which alone can tell that a write is false."""
        held = (self._entries.get(entry.key) for entry in delta.entries)
        return delta.upto > self.version or any(
            mine is None or (mine.version <= entry.version and mine != entry)
            for mine, entry in zip(held, delta.entries, strict=True)
            if entry.version > self.collected
        )

    # both

    def delta(self, known: Known, budget_bytes: int) -> FactsDelta | None:
        """Returns what a copy at `known` lacks, within the budget; None when nothing, or when the first piece does not fit."""
        epoch, version = known
        starts_over = epoch != self.epoch or version < self.collected
        since = 0 if starts_over else version
        if self.overgrown or since >= self.version:
            return None
        kept: list[FactsEntry] = []
        left_bytes, upto = budget_bytes - DELTA_BYTES, self.version
        for entry in self._after(since):
            left_bytes -= entry_bytes(entry)
            if left_bytes < 0:
                upto = kept[-1].version if kept else since
                break
            kept.append(entry)
        if upto <= since or (starts_over and upto < self.collected):
            return None
        return FactsDelta(self.owner, self.epoch, since, upto, self.collected, tuple(kept))

    def news(self, since: int, repeat_bytes: int, budget_bytes: int) -> FactsDelta | None:
        """What was written after `since`, for peers that probably hold all before it; with some of that again, as far
        as `repeat_bytes` go, for pushes overtake one another."""
        start = since
        for entry in reversed(self._entries.values()):
            if entry.version <= since:
                repeat_bytes -= entry_bytes(entry)
                if repeat_bytes < 0:
                    start = max(start, min(self.collected, since))
                    break
                start = entry.version - 1
        else:
            start = 0
        return self.delta((self.epoch, start), budget_bytes) or self.delta((self.epoch, since), budget_bytes)

    def _after(self, version: int) -> Iterator[FactsEntry]:
        newer = list(takewhile(lambda entry: entry.version > version, reversed(self._entries.values())))
        return reversed(newer)

    def _put(self, entry: FactsEntry) -> None:
        old = self._entries.pop(entry.key, None)
        self.size_bytes += entry_bytes(entry) - (entry_bytes(old) if old is not None else 0)
        self._entries[entry.key] = entry
        self.version = max(self.version, entry.version)

    def _collect(self, upto: int) -> None:
        """Drops the tombstones up to `version`."""
        self.collected = upto
        for entry in [e for e in self._entries.values() if e.value is None and e.version <= upto]:
            del self._entries[entry.key]
            self.size_bytes -= entry_bytes(entry)
