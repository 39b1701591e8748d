"""What each node publishes beyond a datagram: one map per owner (`membership.facts.owner_map`), shown as `Facts`.

Only the owner writes, so there is nothing to merge. Copies of an earlier run of their owner are kept but not
shown: its spans and models died with it. Exchanges repair copies (`membership.core.core`); pushes spread changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from membership.facts.fingerprint import Fingerprint
from membership.facts.owner_map import DeltaOutcome, OwnerMap
from mesh.ids import NodeId
from mesh.view import Facts
from mesh.wire.facts_map import DecodedFacts, keys_of
from mesh.wire.sync import MAX_OWNER_BYTES, MAX_VERSION, FactsDelta, Known

NO_FACTS = Facts()
DELTAS_BYTES = 2 * MAX_OWNER_BYTES  # of one message
_OTHERS_SHARE = 4  # the nth part of a message that the first owner leaves to the others
REPEATED_BYTES = 2048  # of older writes in each push, for pushes overtake one another


class FactsBook:
    """The maps of all owners, this node's own included."""

    def __init__(self, me: NodeId, epoch: int, fingerprint: Fingerprint) -> None:
        self.me = me
        self._fingerprint = fingerprint
        self._maps: dict[NodeId, OwnerMap] = {me: OwnerMap(me, epoch)}
        self._shown: dict[NodeId, DecodedFacts] = {me: DecodedFacts()}
        self._head = ""  # the first owner when not everything fitted; the next one is served first next time
        self.rejected = 0

    def __len__(self) -> int:
        return len(self._maps)

    def publish(self, facts: Facts) -> FactsDelta | None:
        """Publishes this node's facts; returns the delta to push, or None when nothing changed.

        Raises:
            LocalError: it is larger than peers accept. All stays as it was.
        """
        mine = self._maps[self.me]
        before = mine.version
        changes = mine.write(keys_of(facts))
        if not changes:
            return None
        self.rejected += self._show(self.me, changes)
        return self._news(mine, before)

    def renew(self, epoch: int) -> FactsDelta | None:
        """Moves this node's facts to another epoch; returns the delta to push."""
        mine = self._maps[self.me]
        mine.renew(epoch)
        self._note(mine)
        return self._news(mine, 0)

    def accept(self, delta: FactsDelta) -> tuple[DeltaOutcome, FactsDelta | None]:
        """Applies a peer's delta; returns the outcome and the delta to pass on. An invalid delta is counted and dropped."""
        if delta.owner == self.me:
            return self._defend(delta)
        held = self._maps.get(delta.owner)
        if held is not None and delta.epoch < held.epoch:
            return DeltaOutcome.KNOWN, None
        fresh = held is None or delta.epoch > held.epoch
        copy = OwnerMap(delta.owner, delta.epoch) if held is None or fresh else held
        before = copy.version
        outcome, changes = copy.apply(delta)
        if outcome is not DeltaOutcome.NEWS:
            self.rejected += outcome is DeltaOutcome.REFUSED
            return outcome, None
        if fresh:
            self._maps[delta.owner], self._shown[delta.owner] = copy, DecodedFacts()
        self.rejected += self._show(delta.owner, changes) + copy.overgrown
        return outcome, self._news(copy, before)

    def of(self, node: NodeId, epoch: int) -> Facts:
        """Returns the facts of the run `epoch` of `node`; empty facts when only an earlier run's are held."""
        held = self._maps.get(node)
        return self._shown[node].facts if held is not None and held.epoch == epoch else NO_FACTS

    def known(self, node: NodeId) -> Known:
        """Returns (epoch, version) of the copy held; (0, 0) without one."""
        held = self._maps.get(node)
        return held.known if held is not None and held.version else (0, 0)

    def deltas(self, behind: Mapping[NodeId, Known], budget_bytes: int = DELTAS_BYTES) -> tuple[list[FactsDelta], bool]:
        """Returns the deltas that a peer with the copies `behind` lacks, and whether some did not fit.

        When space is short every owner gets an even share first, so that neither a large map nor churn delays small changes.
        One owner is served first and may take all it needs, another owner each time, so that a large map is sent at some time.
        """
        owners = [node for node in sorted(behind) if behind[node] < self.known(node)]
        first = next((i for i, node in enumerate(owners) if node > self._head), 0)
        owners = owners[first:] + owners[:first]
        others_bytes = budget_bytes // _OTHERS_SHARE
        head_bytes, share_bytes = budget_bytes - others_bytes, others_bytes // max(1, len(owners) - 1)
        selected: dict[NodeId, FactsDelta] = {}
        left_bytes = budget_bytes
        for limits_bytes in ((head_bytes, share_bytes), (budget_bytes, budget_bytes)):
            for place, node in enumerate(owners):
                spare_bytes = left_bytes + (selected[node].size_bytes if node in selected else 0)
                delta = self._maps[node].delta(behind[node], min(spare_bytes, limits_bytes[place > 0]))
                if delta is not None:
                    selected[node], left_bytes = delta, spare_bytes - delta.size_bytes
        cut = any(self._is_short(node, selected.get(node)) for node in owners)
        self._head = owners[0] if cut else self._head
        return list(selected.values()), cut

    def forget(self, node: NodeId) -> None:
        self._maps.pop(node, None)
        self._shown.pop(node, None)

    def map_of(self, node: NodeId) -> OwnerMap | None:
        return self._maps.get(node)

    def _is_short(self, node: NodeId, selected: FactsDelta | None) -> bool:
        held = self._maps[node]
        return not held.overgrown and (selected is None or selected.upto < held.version)

    def _defend(self, delta: FactsDelta) -> tuple[DeltaOutcome, FactsDelta | None]:
        """Raises this node's version above facts in its name that it never wrote: its version was lost, or they are forged."""
        mine = self._maps[self.me]
        if (
            delta.epoch != mine.epoch
            or not mine.version
            or delta.upto >= MAX_VERSION - MAX_OWNER_BYTES
            or not mine.differs(delta)
        ):
            return DeltaOutcome.KNOWN, None
        mine.outbid(delta.upto)
        self._note(mine)
        return DeltaOutcome.NEWS, self._news(mine, 0)

    def _news(self, copy: OwnerMap, since: int) -> FactsDelta | None:
        return copy.news(since, REPEATED_BYTES, DELTAS_BYTES)

    def _show(self, node: NodeId, changes: Mapping[str, bytes | None]) -> int:
        self._note(self._maps[node])
        return self._shown[node].update(changes)

    def _note(self, copy: OwnerMap) -> None:
        self._fingerprint.facts(copy.owner, *copy.known)
