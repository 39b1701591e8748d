"""Watches how well each model is covered, and says so when a layer comes to its last ready copy, loses it, or gets it back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import structlog

from mesh.ids import ModelId
from mesh.view import View
from routing.coverage import Coverage, CoverageChanged, changes, coverage

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CoverageStatistics:
    """Of each model, copies of the layer that has the fewest: on live nodes, and on those that may be given work now."""

    least_live: Mapping[str, int]
    least_ready: Mapping[str, int]
    changes_total: int


class CoverageWatch:
    """`on_change` is told of each change after it can be read here; it must not block or raise."""

    def __init__(self, changed: Callable[[int], Awaitable[View]]) -> None:
        """`changed`: as `Membership.changed`."""
        self._changed = changed
        self._changes = 0
        self.now: Mapping[ModelId, Coverage] = MappingProxyType({})
        self.on_change: Callable[[CoverageChanged], None] = lambda change: None

    async def run(self) -> None:
        """Until cancelled."""
        version = -1
        while True:
            view = await self._changed(version)
            version = view.version
            self.look(view)

    def look(self, view: View) -> None:
        before, self.now = self.now, MappingProxyType(coverage(view))
        for change in changes(before, self.now):
            self._changes += 1
            say = log.warning if change.now < change.before else log.info
            weakest = [f"{start}:{end}" for start, end in change.weakest]
            say("coverage", model=change.model, ready_copies=change.now, before=change.before, layers=weakest)
            self.on_change(change)

    def statistics(self) -> CoverageStatistics:
        return CoverageStatistics(
            MappingProxyType({model: covered.least_live for model, covered in self.now.items()}),
            MappingProxyType({model: covered.least_ready for model, covered in self.now.items()}),
            self._changes,
        )
