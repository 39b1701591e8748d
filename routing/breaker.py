"""A circuit breaker for each peer: after several failures in a row it gets nothing new for a while, then one probe.

Unlike gossip's verdict this is a local opinion, of a peer that is alive but fails what it is sent. It opens after five
failures in a row, for a time that doubles with each failed probe. When the time is over exactly one request goes there
as a probe: opening the gate to all (as SGLang's breaker does) kills a peer that is just recovering. Any success closes
it, and so does a restart of the peer; a mark that only traffic could clear would exclude idle peers for ever (dynamo
#12138). Were more than half of the peers open, the fault is likelier here or everywhere: then none counts as open.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from mesh.ids import NodeId

FAILURES_TO_OPEN = 5
FIRST_OPEN_S = 1.0
MAX_OPEN_S = 30.0
PROBE_S = 30.0
"""A probe that has not reported by then is taken for lost, and another may go."""

PANIC_SHARE = 0.5


class Circuit(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"  # the time is over: one probe may go, or is out


@dataclass(slots=True)
class _Record:
    failures: int = 0  # in a row
    opened: int = 0  # times in a row, with no success between
    open_until: float = 0.0
    probe_until: float = 0.0  # a probe is out until then


class Breakers:
    """The circuits of all peers. A peer without failures has no record."""

    def __init__(self) -> None:
        self._records: dict[NodeId, _Record] = {}

    def succeeded(self, node: NodeId) -> None:
        """Any success closes the circuit at once."""
        self._records.pop(node, None)

    def restarted(self, node: NodeId) -> None:
        """The peer left, died or came back with a new epoch: its past says nothing of its next life."""
        self._records.pop(node, None)

    def failed(self, node: NodeId, now: float) -> None:
        """The peer failed what it was sent. A refusal is no failure, nor is a cancelled request."""
        record = self._records.setdefault(node, _Record())
        record.failures += 1
        half_open = record.opened > 0 and now >= record.open_until
        if record.failures < FAILURES_TO_OPEN and not half_open:
            return
        if record.opened > 0 and not half_open:
            return  # late failures of what was sent before it opened
        record.opened += 1
        record.open_until = now + min(MAX_OPEN_S, FIRST_OPEN_S * 2.0 ** (min(record.opened, 16) - 1))
        record.probe_until = 0.0

    def dispatched(self, node: NodeId, now: float) -> None:
        """Something is sent there: if the circuit is half-open, this is its probe."""
        if self.circuit(node, now) is Circuit.HALF_OPEN:
            self._records[node].probe_until = now + PROBE_S

    def given_up(self, node: NodeId) -> None:
        """What was sent there was cancelled or refused: it says nothing, another probe may go."""
        record = self._records.get(node)
        if record is not None:
            record.probe_until = 0.0

    def circuit(self, node: NodeId, now: float) -> Circuit:
        record = self._records.get(node)
        if record is None or record.opened == 0:
            return Circuit.CLOSED
        return Circuit.OPEN if now < record.open_until else Circuit.HALF_OPEN

    def allows(self, node: NodeId, now: float) -> bool:
        """Closed, or half-open with no probe out."""
        match self.circuit(node, now):
            case Circuit.CLOSED:
                return True
            case Circuit.OPEN:
                return False
            case Circuit.HALF_OPEN:
                return now >= self._records[node].probe_until

    def avoided(self, nodes: Collection[NodeId], now: float) -> frozenset[NodeId]:
        """Of `nodes` those that should get nothing now; none of them when it would be more than half."""
        shut = frozenset(node for node in nodes if not self.allows(node, now))
        return frozenset() if len(shut) > PANIC_SHARE * len(nodes) else shut

    def statistics(self, now: float) -> dict[NodeId, Circuit]:
        """Circuits that are not closed."""
        return {node: self.circuit(node, now) for node in self._records if self.circuit(node, now) is not Circuit.CLOSED}
