"""Whether this node should be given work, apart from whether it lives: looked at often, told to all at once when it changes.

A process whose engine hangs still answers every ping. So progress is watched where work is done: a step that takes far
longer than any step of late did is a stall, and peers pass this node over until the step ends.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mesh.view import Facts, Load, Readiness
from node.serving.own_facts import OwnFacts

LOOK_EVERY_S = 0.25
CALM_S = 2.0  # an overload must be over for so long: what comes and goes faster is not worth telling everyone
_FULL_SHARE = 0.95  # of the KV blocks, with requests waiting


def readiness_of(facts: Facts, load: Load, overdue_s: float) -> Readiness:
    """The gravest that holds. `overdue_s`: how long the engine's step is past anything its past explains; 0 at rest."""
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
    def __init__(self, facts: OwnFacts, load: Callable[[], Load], overdue_s: Callable[[], float]) -> None:
        self._facts, self._load, self._overdue_s = facts, load, overdue_s
        self.stalls = 0
        self._calm_since: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look(trio.current_time())
            await trio.sleep(LOOK_EVERY_S)

    def look(self, now: float) -> None:
        told = self._facts.now.readiness
        found = readiness_of(self._facts.now, self._load(), self._overdue_s())
        if told is Readiness.OVERLOADED and found is Readiness.WARM:
            self._calm_since = now if self._calm_since is None else self._calm_since
            if now - self._calm_since < CALM_S:
                return
        self._calm_since = None
        self.stalls += found is Readiness.STALLED and told is not found
        self._facts.ready(found)
