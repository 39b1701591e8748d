"""This node's own work in flight, per peer: dispatches that the peers' gossiped load records do not include yet.

A load record is a snapshot. Between two snapshots an entry that sends ten requests to a peer that looked idle would see
it idle ten times, as do routers that count load only when an answer begins (vllm-project/router #179: one of eight engines
got everything). So every dispatch counts from the moment it is made, until a newer record of that peer includes it.

Times are local monotonic seconds, passed in as arguments.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mesh.errors import LocalError
from mesh.ids import NodeId

ENDED_KEPT = 512
"""Ended dispatches kept per peer, to subtract what a record still counts; enough for 100 a second over 5 s of gossip."""

RESPONSE_WEIGHT = 0.1
"""Weight of the newest response time in its moving average (the value of Parallax's `ttft_ema`, and of C3's)."""

OUTCOME_HALF_LIFE = 200.0
"""Number of later outcomes after which a failure counts half, so that a repaired peer recovers its score."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One request's stage at one peer, from `dispatch` to `done`."""

    number: int
    node: NodeId
    at: float
    prefill_tokens: int


@dataclass(frozen=True, slots=True)
class DispatchedWork:
    """This node's own work at one peer, relative to a load record that arrived at some time."""

    added: int = 0  # dispatched since the record, still running: the record does not count them yet
    ended: int = 0  # dispatched before the record and ended since: the record still counts them
    prefill_tokens: int = 0  # of `added`
    in_flight: int = 0  # all own dispatches that run there now
    response_ms: float = 0.0  # moving average of own completed dispatches; 0: none yet
    failed: float = 0.0  # decayed counts of outcomes
    finished: float = 0.0


@dataclass(slots=True)
class _PeerLedger:
    running: dict[int, Dispatch] = field(default_factory=dict)
    ended: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=ENDED_KEPT))  # (dispatched, ended)
    response_ms: float = 0.0
    failed: float = 0.0
    finished: float = 0.0


NOTHING = DispatchedWork()


class Dispatches:
    """The ledger of own dispatches: `dispatch` before a request is sent, `done` however it ends."""

    def __init__(self) -> None:
        self._peers: dict[NodeId, _PeerLedger] = {}
        self._next = 0

    def dispatch(self, node: NodeId, now: float, prefill_tokens: int = 0) -> Dispatch:
        """Records a dispatch; it counts from this moment, not from the first answer."""
        self._next += 1
        sent = Dispatch(self._next, node, now, prefill_tokens)
        self._peers.setdefault(node, _PeerLedger()).running[sent.number] = sent
        return sent

    def done(self, sent: Dispatch, now: float, *, ok: bool | None = True) -> None:
        """Records the end of a dispatch. `ok`: True completed, False failed by the peer, None cancelled or refused.

        A second call for one dispatch changes nothing, nor does a call for a peer that was forgotten.

        Raises:
            LocalError: `now` is before the dispatch.
        """
        if now < sent.at:
            raise LocalError(f"dispatch {sent.number} made at {sent.at} cannot end at {now}")
        ledger = self._peers.get(sent.node)
        if ledger is None or ledger.running.pop(sent.number, None) is None:
            return
        ledger.ended.append((sent.at, now))
        if ok is None:
            return
        keep = 0.5 ** (1.0 / OUTCOME_HALF_LIFE)
        ledger.failed = ledger.failed * keep + (0.0 if ok else 1.0)
        ledger.finished = ledger.finished * keep + 1.0
        if ok:
            took_ms = (now - sent.at) * 1000.0
            known = ledger.response_ms > 0.0
            ledger.response_ms += (took_ms - ledger.response_ms) * (RESPONSE_WEIGHT if known else 1.0)

    def forget(self, node: NodeId) -> None:
        """Drops all records of a peer that died, left or restarted."""
        self._peers.pop(node, None)

    def own(self, node: NodeId, record_at: float) -> DispatchedWork:
        """Own work at `node` that is to be combined with a load record which arrived at `record_at`."""
        ledger = self._peers.get(node)
        if ledger is None:
            return NOTHING
        fresh = [sent for sent in ledger.running.values() if sent.at >= record_at]
        ended = sum(1 for began, end in ledger.ended if began < record_at <= end)
        return DispatchedWork(
            added=len(fresh),
            ended=ended,
            prefill_tokens=sum(sent.prefill_tokens for sent in fresh),
            in_flight=len(ledger.running),
            response_ms=ledger.response_ms,
            failed=ledger.failed,
            finished=ledger.finished,
        )

    def residency_s(self, otherwise: float) -> float:
        """How long own requests stay with a peer: the mean of the peers' averages; `otherwise` before any has ended."""
        known = [ledger.response_ms for ledger in self._peers.values() if ledger.response_ms > 0.0]
        return max(0.001, sum(known) / len(known) / 1000.0) if known else otherwise

    def in_flight(self) -> dict[NodeId, int]:
        """The number of own dispatches that run at each peer, for peers with any."""
        return {node: len(ledger.running) for node, ledger in self._peers.items() if ledger.running}
