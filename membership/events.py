"""What membership tells the rest of the node: events of members, figures, and why a join failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from membership.swim import SwimStatistics
from mesh.errors import MeshError
from mesh.ids import Address, NodeId, format_address
from mesh.view import PeerState


class JoinFailed(MeshError):
    """No seed answered. The message names each seed and why; the node is up, alone, and keeps trying them.

    `refused`: at one of them somebody answers who will not have us, or is no mesh node; time alone will not mend that.
    """

    def __init__(self, reasons: Mapping[Address, str], *, refused: bool = False) -> None:
        told = "; ".join(f"{format_address(seed)}: {reason}" for seed, reason in reasons.items())
        super().__init__(f"could not join the mesh: {told}; check the addresses, and that the key and the cluster are the same")
        self.reasons = dict(reasons)
        self.refused = refused


@dataclass(frozen=True, slots=True)
class MemberEvent:
    """A member came, went, or came back as another run (`restarted`: what ran there is gone). `before` None: a newcomer."""

    node: NodeId
    before: PeerState | None
    after: PeerState
    restarted: bool = False
    stalled: bool = False  # silent, but its process exists: what runs there may come back, or be dead later

    @property
    def down(self) -> bool:
        """What ran on that node is lost: it died, left, or restarted."""
        return self.after in (PeerState.DEAD, PeerState.LEFT) or self.restarted


@dataclass(frozen=True, slots=True)
class MembershipStatistics:
    """Counts since the start; members by state, and the view's version, as of now."""

    members: Mapping[str, int]
    view_version: int
    datagrams_sent: int
    datagrams_received: int
    bytes_sent: int
    bytes_received: int
    datagrams_dropped: Mapping[str, int]  # by reason
    exchanges: int
    pushes: int
    calls_failed: int
    calls_skipped: int
    facts_rejected: int
    swim: SwimStatistics
