"""What each node tells of itself beyond a datagram: one `Facts` record an owner, newest (epoch, version) wins.

Only the owner writes, so there is nothing to merge. Records of an earlier run of their owner are kept but not
shown: its spans and models died with it. Repair is by exchange (`membership.core`), spread by pushes.
Source: the state reconciliation of Scuttlebutt (van Renesse et al., LADIS 2008), one key an owner.
"""

from __future__ import annotations

from membership.fingerprint import Fingerprint
from mesh.errors import LocalError
from mesh.ids import NodeId
from mesh.sync import MAX_FACTS_BYTES, BadSync, FactsRecord, decode_facts, encode
from mesh.view import Facts

NO_FACTS = Facts()


class FactsBook:
    """All records, this node's own included."""

    def __init__(self, me: NodeId, epoch: int, fingerprint: Fingerprint) -> None:
        self.me = me
        self._epoch = epoch
        self._fingerprint = fingerprint
        self._records: dict[NodeId, FactsRecord] = {}
        self._decoded: dict[NodeId, Facts] = {}
        self.rejected = 0

    def __len__(self) -> int:
        return len(self._records)

    def publish(self, facts: Facts) -> FactsRecord | None:
        """This node's own record from now on; None when nothing changed.

        Raises:
            LocalError: it is larger than peers accept. The old record stays.
        """
        body = encode(facts)
        if len(body) > MAX_FACTS_BYTES:
            raise LocalError(f"a facts record may take {MAX_FACTS_BYTES} bytes, this one takes {len(body)}")
        mine = self._records.get(self.me)
        if mine is not None and mine.epoch == self._epoch and mine.body == body:
            return None
        version = mine.version + 1 if mine is not None and mine.epoch == self._epoch else 1
        return self._write(FactsRecord(self.me, self._epoch, version, body), facts)

    def renew(self, epoch: int) -> FactsRecord | None:
        """This node counts as another run now: what it published holds for that one."""
        self._epoch = epoch
        mine = self._records.get(self.me)
        return self._write(FactsRecord(self.me, epoch, 1, mine.body), self._decoded[self.me]) if mine else None

    def accept(self, record: FactsRecord) -> bool:
        """Takes a peer's copy in; True when it was news. A record that does not decode is counted and left out."""
        if record.owner == self.me:
            return self._defend(record)
        known = self.version(record.owner)
        if (record.epoch, record.version) <= known:
            return False
        try:
            facts = decode_facts(record.body)
        except BadSync:
            self.rejected += 1
            return False
        self._write(record, facts)
        return True

    def of(self, node: NodeId, epoch: int) -> Facts:
        """What the run `epoch` of `node` tells; nothing when only an earlier run was heard."""
        record = self._records.get(node)
        return self._decoded[node] if record is not None and record.epoch == epoch else NO_FACTS

    def record(self, node: NodeId) -> FactsRecord | None:
        return self._records.get(node)

    def version(self, node: NodeId) -> tuple[int, int]:
        """(epoch, version) of the record held; (0, 0) without one."""
        record = self._records.get(node)
        return (record.epoch, record.version) if record is not None else (0, 0)

    def forget(self, node: NodeId) -> None:
        self._records.pop(node, None)
        self._decoded.pop(node, None)

    def _defend(self, record: FactsRecord) -> bool:
        """A copy of our own record that is ahead of ours: we lost count. The mesh must hear ours, so it goes ahead."""
        mine = self._records.get(self.me)
        same_run = mine is not None and record.epoch == mine.epoch == self._epoch
        if mine is None or not same_run or record.version < mine.version or record == mine:
            return False
        self._write(FactsRecord(self.me, self._epoch, record.version + 1, mine.body), self._decoded[self.me])
        return True

    def _write(self, record: FactsRecord, facts: Facts) -> FactsRecord:
        self._records[record.owner] = record
        self._decoded[record.owner] = facts
        self._fingerprint.facts(record.owner, record.epoch, record.version)
        return record
