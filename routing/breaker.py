"""A circuit breaker for each peer: after several failures in a row the peer gets no new requests for a time, then one probe.

Unlike membership's record this is local to one entry, and about a peer that is alive but fails its requests. A circuit opens
after five failures in a row, for a time that doubles with each failed probe. After that time exactly one request is sent to
the peer as a probe: sending all requests again (as SGLang's breaker does) overloads a peer that is just recovering. A success
closes the circuit, and so does a restart of the peer; a circuit that only traffic could close would exclude idle peers for ever
(dynamo #12138). If more than half of the peers' circuits are open, the fault is likelier here or everywhere: then none counts.
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
"""A probe without an outcome by then counts as lost, and another may be sent."""

PANIC_SHARE = 0.5
"""If more than this share of the peers would be avoided, none is."""


class Circuit(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"  # the time is over: one probe may be sent, or is under way


@dataclass(slots=True)
class _Record:
    failures: int = 0  # in a row
    opened: int = 0  # how many times in a row, without a success in between
    open_until: float = 0.0
    probe_until: float = 0.0  # a probe is under way until then


class Breakers:
    """The circuits of all peers. A peer without failures has no record."""

    def __init__(self) -> None:
        self._records: dict[NodeId, _Record] = {}

    def succeeded(self, node: NodeId) -> None:
        """Closes the circuit: one success is enough."""
        self._records.pop(node, None)

    def restarted(self, node: NodeId) -> None:
        """Drops the record of a peer that left, died or started again: it does not hold for its next start."""
        self._records.pop(node, None)

    def failed(self, node: NodeId, now: float) -> None:
        """Records that the peer failed a request. Refused and cancelled requests are no failures."""
        record = self._records.setdefault(node, _Record())
        record.failures += 1
        half_open = record.opened > 0 and now >= record.open_until
        if record.failures < FAILURES_TO_OPEN and not half_open:
            return
        if record.opened > 0 and not half_open:
            return  # a late failure of a request that was sent before the circuit opened
        record.opened += 1
        record.open_until = now + min(MAX_OPEN_S, FIRST_OPEN_S * 2.0 ** (min(record.opened, 16) - 1))
        record.probe_until = 0.0

    def dispatched(self, node: NodeId, now: float) -> None:
        """Records that a request is sent to the peer; if the circuit is half-open, it is the probe."""
        if self.circuit(node, now) is Circuit.HALF_OPEN:
            self._records[node].probe_until = now + PROBE_S

    def given_up(self, node: NodeId) -> None:
        """Records that a request was cancelled or refused: if it was the probe, another may be sent."""
        record = self._records.get(node)
        if record is not None:
            record.probe_until = 0.0

    def circuit(self, node: NodeId, now: float) -> Circuit:
        record = self._records.get(node)
        if record is None or record.opened == 0:
            return Circuit.CLOSED
        return Circuit.OPEN if now < record.open_until else Circuit.HALF_OPEN

    def allows(self, node: NodeId, now: float) -> bool:
        """Whether a request may be sent to the peer: closed, or half-open without a probe under way."""
        match self.circuit(node, now):
            case Circuit.CLOSED:
                return True
            case Circuit.OPEN:
                return False
            case Circuit.HALF_OPEN:
                return now >= self._records[node].probe_until

    def avoided(self, nodes: Collection[NodeId], now: float) -> frozenset[NodeId]:
        """Those of `nodes` that should get no requests now; none if they would be more than `PANIC_SHARE`."""
        not_allowed = frozenset(node for node in nodes if not self.allows(node, now))
        return frozenset() if len(not_allowed) > PANIC_SHARE * len(nodes) else not_allowed

    def statistics(self, now: float) -> dict[NodeId, Circuit]:
        """The circuits that are not closed."""
        return {node: self.circuit(node, now) for node in self._records if self.circuit(node, now) is not Circuit.CLOSED}
