"""Decides whether this node should be given work, and publishes changes of that at once.

A process whose engine hangs still answers every ping. So progress is watched in the engine: a step that takes far longer than any
recent step is a stall, and peers avoid this node until the step ends.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mesh.view import Facts, Load, Readiness
from node.serving.own_facts import OwnFacts

CHECK_EVERY_S = 0.25
CALM_S = 2.0  # an overload must be over for this long before that is published, as each change goes to every member
_FULL_SHARE = 0.95  # of the KV blocks, with requests waiting


def readiness_of(facts: Facts, load: Load, overdue_s: float) -> Readiness:
    """The most severe state that applies. `overdue_s`: how long the engine's step exceeds any recent step; 0 at rest."""
    if facts.draining:
        return Readiness.DRAINING
    if overdue_s > 0:
        return Readiness.STALLED
    hashing = any(not card.weights for card in facts.models)
    if (facts.intends or hashing) and not facts.spans:
        return Readiness.LOADING
    if load.waiting and load.kv_blocks_used >= _FULL_SHARE * load.kv_blocks_total > 0:
        return Readiness.OVERLOADED
    return Readiness.WARM


class ReadinessMonitor:
    """Publishes this node's readiness; `stalls` counts the stalls since the start."""

    def __init__(self, facts: OwnFacts, load: Callable[[], Load], overdue_s: Callable[[], float]) -> None:
        self._facts, self._load, self._overdue_s = facts, load, overdue_s
        self.stalls = 0
        self._calm_since: float | None = None

    async def run(self) -> None:
        """Checks and publishes the readiness until cancelled."""
        while True:
            self.check(trio.current_time())
            await trio.sleep(CHECK_EVERY_S)

    def check(self, now: float) -> None:
        """Publishes the readiness if it has changed."""
        published = self._facts.now.readiness
        found = readiness_of(self._facts.now, self._load(), self._overdue_s())
        if published is Readiness.OVERLOADED and found is Readiness.WARM:
            self._calm_since = now if self._calm_since is None else self._calm_since
            if now - self._calm_since < CALM_S:
                return
        self._calm_since = None
        self.stalls += found is Readiness.STALLED and published is not found
        self._facts.set_readiness(found)
