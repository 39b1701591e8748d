"""Reacts to another live process with this node's identity: the younger one ends, the older one reports it to the mesh.

Which of the two is the younger is decided by `membership.core.twins`.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from mesh.errors import MeshError
from mesh.ids import NodeId, format_address
from mesh.wire.twin import ProcessRun
from node.serving.own_facts import OwnFacts

TOLD_FOR_S = 600.0  # since it was last seen: long enough for an operator to ask `mesh doctor`

log = structlog.get_logger()


class IdentityInUse(MeshError):
    """This process is to end: an older one is the same node. The message names its address, and the remedy."""

    def __init__(self, me: NodeId, by: ProcessRun) -> None:
        super().__init__(
            f"node {me} lives already: {by.name} at {format_address(by.address)}, for {_ago(by.age_s)}; this process is a "
            "copy of it (a copied data directory, or a cloned image) and ends. To run it as a node of its own, start it with "
            "--new-identity (its documents and weights stay) or with another --data-dir"
        )


class IdentityWatch:
    """`seen` and `displaced` are called by membership; `run` raises `IdentityInUse` when this process is to end."""

    def __init__(self, me: NodeId, facts: OwnFacts, clock: Callable[[], float] = trio.current_time) -> None:
        self._me, self._facts, self._clock = me, facts, clock
        self._seen_at = 0.0
        self._displaced_by: ProcessRun | None = None
        self._displaced = trio.Event()

    def seen(self, twin: ProcessRun) -> None:
        """Tells the mesh, so that `mesh doctor` names both places on every node."""
        self._seen_at = self._clock()
        where = f"{twin.name} at {format_address(twin.address)}"
        if where != self._facts.now.twin:
            do = "start the copy with --new-identity; the younger of the two ends by itself"
            log.error("identity.in_use", also=where, for_s=round(twin.age_s, 1), do=do)
        self._facts.set_twin(where)

    def displaced(self, by: ProcessRun) -> None:
        self._displaced_by = by
        self._displaced.set()

    def sweep(self) -> None:
        """Forgets one that was not seen for long."""
        if self._facts.now.twin and self._clock() - self._seen_at > TOLD_FOR_S:
            self._facts.set_twin("")

    async def run(self) -> None:
        """Until cancelled. Raises IdentityInUse."""
        await self._displaced.wait()
        assert self._displaced_by is not None
        raise IdentityInUse(self._me, self._displaced_by)


def _ago(age_s: float) -> str:
    return f"{age_s:.0f} s" if age_s < 120 else f"{age_s / 60:.0f} min" if age_s < 7200 else f"{age_s / 3600:.0f} h"
