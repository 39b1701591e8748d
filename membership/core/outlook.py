"""Loss batches and frozen views: which losses belong together, and whether this node may act on what it sees.

A **loss batch** is what was lost within one short while: reported once, when nothing more has been lost for `SETTLE_S` and no
suspicion is open that may belong to it, and within `PATIENCE_S` in any case. While the view is frozen both are longer: a node
that finds most others silent doubts itself and probes slowly, and nothing is moved meanwhile. A member that came back is not in
it. The **last stable view** is the members when nothing had changed for `SETTLED_S` and none was suspect. While more than a
third of it has fallen silent, the view is *frozen*: this node may be the one that is cut off, and a mesh that shuffles weights
and documents cannot answer. It thaws when enough of them are back, or when what is left has not changed for `RESIGNED_S`: then
they are gone. A member that left is not missing, nor one whose own host refuses its port; and one node alone is never a reason.
All in constant time for each change of a member.
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
PATIENCE_S = 12.0  # silence takes up to 9 s to become certain of all where a third is lost
FROZEN_SETTLE_S = 8.0  # the slowest prober's period is 7.2 s
SETTLED_S = 2.0
RESIGNED_S = 60.0
FREEZE_SHARE = 1 / 3  # of the last stable view; more than that missing at once: known before silence is certain of any

_LIVE = (PeerState.ALIVE, PeerState.SUSPECT)


class LossBatching:
    """Follows the changes of members; says what they amount to."""

    def __init__(self, members: Members, now: float) -> None:
        self._members = members
        self._changed_at = now
        # Of the last stable view: the members suspect now, and the dead; and live members beyond it. All others of it are alive.
        self._doubted: set[NodeId] = set()
        self._lost: set[NodeId] = set()
        self._fresh: set[NodeId] = set()
        self._batch: dict[NodeId, bool] = {}  # lost since the last cut was told; True: it said goodbye
        self._batch_since = self._batch_grew_at = now
        self.frozen = False
        self.cuts = 0

    @property
    def deadline(self) -> float:
        """When `tick` next has something to say, if nothing changes; infinite at rest."""
        changed = self._doubted or self._lost or self._fresh
        if not changed and not self._batch:
            return math.inf  # asked after every datagram
        stable_at = (
            math.inf if self._members.suspects or not changed else self._changed_at + (RESIGNED_S if self.frozen else SETTLED_S)
        )
        return min(self._batch_at, stable_at)

    @property
    def settled(self) -> bool:
        """No losses are under way that have not been told of yet."""
        return not self._batch

    @property
    def stable_count(self) -> int:
        """Members of the last stable view."""
        return self._members.live_count - len(self._fresh) + len(self._lost)

    @property
    def _batch_at(self) -> float:
        """When the losses so far are told, if nothing changes."""
        if not self._batch:
            return math.inf
        last_at = self._batch_since + (RESIGNED_S if self.frozen else PATIENCE_S)
        settled_at = self._batch_grew_at + (FROZEN_SETTLE_S if self.frozen else SETTLE_S)
        return last_at if self._members.suspects else min(last_at, settled_at)

    def follow(self, notices: Iterable[MembershipEffect], now: float) -> list[MembershipEffect]:
        """Takes in what happened to members; what that amounts to at once."""
        for notice in notices:
            match notice:
                case MemberChanged(node=node, before=before, after=after, restarted=restarted):
                    self._move(node, before, after, now)
                    self._grow_batch(node, before, after, restarted, now)
                case MemberForgotten(node=node):
                    for group in (self._doubted, self._lost, self._fresh):
                        group.discard(node)
        return self._judge()

    def tick(self, now: float) -> list[MembershipEffect]:
        effects: list[MembershipEffect] = []
        if not (self._batch or self._doubted or self._lost or self._fresh):
            return effects  # as at nearly every tick
        suspects = bool(self._members.suspects)
        if now >= self._batch_at:
            gone = sorted(self._batch)
            effects.append(LossBatch(tuple(n for n in gone if not self._batch[n]), tuple(n for n in gone if self._batch[n])))
            self._batch = {}
            self.cuts += 1
        if not suspects and now >= self._changed_at + (RESIGNED_S if self.frozen else SETTLED_S):
            self._doubted, self._lost, self._fresh = set(), set(), set()
        return effects + self._judge()

    def _judge(self) -> list[MembershipEffect]:
        missing = len(self._doubted) + len(self._lost)
        frozen = missing > 1 and missing > FREEZE_SHARE * self.stable_count
        if frozen is self.frozen:
            return []
        self.frozen = frozen
        return [ViewFrozen(frozen)]

    def _move(self, node: NodeId, before: PeerState | None, after: PeerState, now: float) -> None:
        """Keeps the sets in step with one change."""
        if before is not after:
            self._changed_at = now
        was_stable = node in self._lost or (before in _LIVE and node not in self._fresh)
        for group in (self._doubted, self._lost, self._fresh):
            group.discard(node)
        if not was_stable:
            if after in _LIVE:
                self._fresh.add(node)
        elif after is PeerState.SUSPECT:
            self._doubted.add(node)
        elif after is PeerState.DEAD and self._members[node].cause != REFUSED:
            self._lost.add(node)

    def _grow_batch(self, node: NodeId, before: PeerState | None, after: PeerState, restarted: bool, now: float) -> None:
        fell = after not in _LIVE and before in _LIVE
        if fell or (restarted and before in _LIVE):
            if not self._batch:
                self._batch_since = now
            self._batch[node] = after is PeerState.LEFT
            self._batch_grew_at = now
        elif after is PeerState.ALIVE and before not in _LIVE and not restarted:
            self._batch.pop(node, None)
