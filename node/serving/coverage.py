"""Watches how well each model is covered, and logs when a layer comes down to its last ready copy, loses it, or gets one back."""

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
    """For each model, the copies of its least replicated layer: on live nodes, and on nodes that may be given work now."""

    least_live: Mapping[str, int]
    least_ready: Mapping[str, int]
    changes_total: int


class CoverageWatch:
    """Keeps the coverage of the latest view in `now`. `on_change` is called after each change; it must not block or raise."""

    def __init__(self, changed: Callable[[int], Awaitable[View]]) -> None:
        """`changed`: as `Membership.changed`."""
        self._changed = changed
        self._changes = 0
        self.now: Mapping[ModelId, Coverage] = MappingProxyType({})
        self.on_change: Callable[[CoverageChanged], None] = lambda change: None

    async def run(self) -> None:
        """Follows the view until cancelled."""
        version = -1
        while True:
            view = await self._changed(version)
            version = view.version
            self.update(view)

    def update(self, view: View) -> None:
        """Computes the coverage of a view, and logs what has changed since the last one."""
        before, self.now = self.now, MappingProxyType(coverage(view))
        for change in changes(before, self.now):
            self._changes += 1
            log_change = log.warning if change.now < change.before else log.info
            weakest = [f"{start}:{end}" for start, end in change.weakest]
            log_change("coverage", model=change.model, ready_copies=change.now, before=change.before, layers=weakest)
            self.on_change(change)

    def statistics(self) -> CoverageStatistics:
        return CoverageStatistics(
            MappingProxyType({model: covered.least_live for model, covered in self.now.items()}),
            MappingProxyType({model: covered.least_ready for model, covered in self.now.items()}),
            self._changes,
        )
