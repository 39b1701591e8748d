"""How a mesh changes its key while it runs: what is to be done next, out of what the nodes' rings hold. No I/O.

Every live node opens by the new key before any seals with it, and all seal with it before any lets the old one go: so at no
moment does a node send what another cannot read. The step is a function of the rings alone. A second call, after a crash, a
death or beside another rotation, continues from where the mesh is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from mesh.ids import NodeId
from mesh.keys.keyring import KeyTag

Tags = tuple[KeyTag, ...]
"""A ring as it may be published: the sealing key first."""


class RotationPhase(StrEnum):
    ADD = "add"
    USE = "use"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class RotationStep:
    phase: RotationPhase
    nodes: tuple[NodeId, ...]  # that have not taken it yet


def unfinished(rings: Iterable[Tags]) -> KeyTag | None:
    """The key of a rotation that was begun and not ended, if any: it is finished before another begins."""
    held = {tag for tags in rings for tag in tags}
    return max(held) if len(held) > 1 else None


def next_step(rings: Mapping[NodeId, Tags], key: KeyTag) -> RotationStep | None:
    """What brings all live nodes nearer to `key` and nothing but it; None when they are there.

    `rings`: of every live node. A ring that seals with a later key is past this rotation, and lacks nothing of it.
    """
    lacking = {node for node, tags in rings.items() if key not in tags and tags[0] < key}
    behind = {node for node, tags in rings.items() if tags[0] < key}
    holding = {node for node, tags in rings.items() if min(tags) < key}
    for phase, nodes in ((RotationPhase.ADD, lacking), (RotationPhase.USE, behind), (RotationPhase.DROP, holding)):
        if nodes:
            return RotationStep(phase, tuple(sorted(nodes)))
    return None
