"""Events of members, statistics, and the error of a failed join."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from membership.core.effects import LossBatch
from membership.core.swim import SwimStatistics
from mesh.errors import MeshError
from mesh.ids import Address, NodeId, format_address
from mesh.view import PeerState, View

if TYPE_CHECKING:
    from membership.core.core import MembershipCore
    from membership.shell.datagrams import Datagrams

__all__ = ["JoinFailed", "LossBatch", "MemberEvent", "MembershipStatistics"]


class JoinFailed(MeshError):
    """No seed answered. The message names each seed and why; the node is up, alone, and keeps trying them.

    `refused`: at one of them a node of another mesh answered, or no mesh node; waiting does not help.
    """

    def __init__(self, reasons: Mapping[Address, str], *, refused: bool = False) -> None:
        causes = "; ".join(f"{format_address(seed)}: {reason}" for seed, reason in reasons.items())
        super().__init__(f"could not join the mesh: {causes}; check the addresses, and that the key and the cluster are the same")
        self.reasons = dict(reasons)
        self.refused = refused


@dataclass(frozen=True, slots=True)
class MemberEvent:
    """A member joined, was lost, or restarted (what ran there is lost). `before` None: a newcomer."""

    node: NodeId
    before: PeerState | None
    after: PeerState
    restarted: bool = False
    stalled: bool = False  # silent, but its process exists: what runs there may recover, or be declared dead later

    @property
    def down(self) -> bool:
        """What ran on the node is lost: it died, left, or restarted."""
        return self.after in (PeerState.DEAD, PeerState.LEFT) or self.restarted


@dataclass(frozen=True, slots=True)
class MembershipStatistics:
    """Counts since the start; members by state, and the view's version, as of now."""

    members: Mapping[str, int]
    view_version: int
    datagrams_sent_total: int
    datagrams_received_total: int
    bytes_sent_total: int
    bytes_received_total: int
    datagrams_dropped_total: Mapping[str, int]  # by reason
    exchanges_total: int
    pushes_total: int
    calls_failed_total: int
    calls_skipped_total: int
    facts_rejected_total: int
    cuts_total: int
    freezes_total: int
    frozen: bool
    swim: SwimStatistics


def statistics_of(
    core: MembershipCore,
    view: View,
    states: Iterable[PeerState],
    datagrams: Datagrams,
    counts: Mapping[str, int],
    now: float,
) -> MembershipStatistics:
    """`states`: of all members; `counts`: the shell's own."""
    found = Counter(states)
    return MembershipStatistics(
        MappingProxyType({state.value: found[state] for state in PeerState}),
        view.version,
        datagrams.sent,
        datagrams.received,
        datagrams.bytes_sent,
        datagrams.bytes_received,
        MappingProxyType(datagrams.dropped + core.allowance.dropped),
        counts["exchanges"],
        counts["pushes"],
        counts["calls_failed"],
        counts["calls_skipped"],
        core.facts.rejected,
        core.outlook.loss_batches,
        counts["freezes"],
        view.frozen,
        core.swim.statistics(now),
    )
