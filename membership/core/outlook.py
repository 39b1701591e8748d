"""Loss batches and frozen views: which losses belong together, and whether this node may act on its view.

A **loss batch** holds the members lost within one short while: reported once, when nothing more has been lost for `SETTLE_S`
and no suspicion is open that may belong to it, and within `PATIENCE_S` in any case. While the view is frozen both are longer:
the health score of a node to which most others are silent is high, so it probes slowly, and nothing is moved meanwhile. A
member that returned is removed from the batch.

The **last stable view** holds the members when nothing had changed for `SETTLED_S` and none was suspect. While more than a
third of it is silent, the view is *frozen*: this node may be the one that is cut off, and a mesh that moves weights and
documents cannot serve. The view thaws when enough of them are back, or when nothing has changed for `RESIGNED_S`: then they
are taken for gone. A member that left is not missing, nor a member whose own host refuses its port; and a single missing
member never freezes the view. Each change of a member costs constant time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from membership.core.effects import LossBatch, MemberChanged, MemberForgotten, MembershipEffect, ViewFrozen
from mesh.view import PeerState
from mesh.wire.gossip import REFUSED

if TYPE_CHECKING:
    from membership.core.members import Members
    from mesh.ids import NodeId

SETTLE_S = 0.2
PATIENCE_S = 12.0  # where a third is lost, it takes up to 9 s until all suspicions have ended
FROZEN_SETTLE_S = 8.0  # the slowest prober's period is 7.2 s
SETTLED_S = 2.0
RESIGNED_S = 60.0
FREEZE_SHARE = 1 / 3  # of the last stable view; suspects count, so the view freezes before the first of them is declared dead

_LIVE = (PeerState.ALIVE, PeerState.SUSPECT)


class LossBatching:
    """Follows the changes of members; reports loss batches, and when the view freezes or thaws."""

    def __init__(self, members: Members, now: float) -> None:
        self._members = members
        self._changed_at = now
        # The suspects and the dead of the last stable view, and the live members that are not in it. The rest of it is alive.
        self._suspected: set[NodeId] = set()
        self._lost: set[NodeId] = set()
        self._newcomers: set[NodeId] = set()
        self._batch: dict[NodeId, bool] = {}  # lost since the last batch was reported; True: it left
        self._batch_since = self._batch_grew_at = now
        self.frozen = False
        self.loss_batches = 0

    @property
    def deadline(self) -> float:
        """When `tick` next has a batch to report or the view becomes stable, if nothing changes; else infinite."""
        changed = self._suspected or self._lost or self._newcomers
        if not changed and not self._batch:
            return math.inf  # the common case first: read after every datagram
        stable_at = (
            math.inf if self._members.suspects or not changed else self._changed_at + (RESIGNED_S if self.frozen else SETTLED_S)
        )
        return min(self._batch_at, stable_at)

    @property
    def settled(self) -> bool:
        """No losses wait to be reported."""
        return not self._batch

    @property
    def stable_count(self) -> int:
        """Members of the last stable view."""
        return self._members.live_count - len(self._newcomers) + len(self._lost)

    @property
    def _batch_at(self) -> float:
        """When the current batch is reported, if nothing changes."""
        if not self._batch:
            return math.inf
        last_at = self._batch_since + (RESIGNED_S if self.frozen else PATIENCE_S)
        settled_at = self._batch_grew_at + (FROZEN_SETTLE_S if self.frozen else SETTLE_S)
        return last_at if self._members.suspects else min(last_at, settled_at)

    def follow(self, notices: Iterable[MembershipEffect], now: float) -> list[MembershipEffect]:
        """Applies changes of members; returns whether the view freezes or thaws by them."""
        for notice in notices:
            match notice:
                case MemberChanged(node=node, before=before, after=after, restarted=restarted):
                    self._move(node, before, after, now)
                    self._grow_batch(node, before, after, restarted, now)
                case MemberForgotten(node=node):
                    for group in (self._suspected, self._lost, self._newcomers):
                        group.discard(node)
        return self._update_frozen()

    def tick(self, now: float) -> list[MembershipEffect]:
        """Reports the batch that is due, and takes the view for stable when nothing has changed for long enough."""
        effects: list[MembershipEffect] = []
        if not (self._batch or self._suspected or self._lost or self._newcomers):
            return effects  # as at nearly every tick
        suspects = bool(self._members.suspects)
        if now >= self._batch_at:
            assert self._suspected.isdisjoint(self._lost), "a member is suspect or dead, not both"
            gone = sorted(self._batch)
            effects.append(LossBatch(tuple(n for n in gone if not self._batch[n]), tuple(n for n in gone if self._batch[n])))
            self._batch = {}
            self.loss_batches += 1
        # A view with an open suspicion is not stable: the suspect may yet be lost.
        if not suspects and now >= self._changed_at + (RESIGNED_S if self.frozen else SETTLED_S):
            self._suspected, self._lost, self._newcomers = set(), set(), set()
        return effects + self._update_frozen()

    def _update_frozen(self) -> list[MembershipEffect]:
        """Freezes or thaws the view by the share of the last stable view that is missing."""
        missing = len(self._suspected) + len(self._lost)
        # A single silent member never freezes the view, however small the mesh.
        frozen = missing > 1 and missing > FREEZE_SHARE * self.stable_count
        if frozen is self.frozen:
            return []
        self.frozen = frozen
        return [ViewFrozen(frozen)]

    def _move(self, node: NodeId, before: PeerState | None, after: PeerState, now: float) -> None:
        """Moves a member between the sets by one change of its state."""
        assert node not in self._lost or before not in _LIVE, "a dead member of the stable view was not live before"
        if before is not after:
            self._changed_at = now
        # Of the last stable view are the dead in `_lost`, and all members that were live and did not join after it.
        was_stable = node in self._lost or (before in _LIVE and node not in self._newcomers)
        for group in (self._suspected, self._lost, self._newcomers):
            group.discard(node)
        if not was_stable:
            if after in _LIVE:
                self._newcomers.add(node)
        elif after is PeerState.SUSPECT:
            self._suspected.add(node)
        elif after is PeerState.DEAD and self._members[node].cause != REFUSED:  # a refused port is evidence, not silence
            self._lost.add(node)

    def _grow_batch(self, node: NodeId, before: PeerState | None, after: PeerState, restarted: bool, now: float) -> None:
        """Adds a loss to the batch, or removes a member that returned."""
        was_lost = after not in _LIVE and before in _LIVE
        if was_lost or (restarted and before in _LIVE):
            if not self._batch:
                self._batch_since = now
            self._batch[node] = after is PeerState.LEFT
            self._batch_grew_at = now
        elif after is PeerState.ALIVE and before not in _LIVE and not restarted:  # a restart lost what ran there
            self._batch.pop(node, None)
