"""Local health of this node: Lifeguard's score, and the measured lag that it reports to its peers.

A slow node takes all others for silent. Its score grows with each sign that the fault is its own (a relay's nack that did not
come, a suspicion of itself to refute) and lengthens all its time-outs. The lag is measured, not inferred: how late timers fire,
and how long datagrams waited in the socket, by the kernel's timestamp. Peers lengthen their time-outs by the reported lag.
Source: Lifeguard (arXiv 1707.00788), section IV-A, with memberlist's rules; the reported lag is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_SCORE = 8
LAG_MAX_S = 5.0  # a larger reported lag lengthens no time-out further
_LAG_NOTED_S = 0.02  # a smaller lag is ordinary scheduling
_LAG_HALVES_S = 5.0


@dataclass(slots=True)
class LocalHealth:
    """Local health of one node. `score`: 0 (healthy) to 8."""

    score: int = 0
    _lag_s: float = 0.0
    _lag_at: float = 0.0

    @property
    def factor(self) -> int:
        """The factor by which probe time-outs are lengthened."""
        return 1 + self.score

    def note(self, change: int) -> None:
        """Changes the score: -1 for a probe that was answered; above 0 for signs of this node's own fault."""
        self.score = min(MAX_SCORE, max(0, self.score + change))

    def lagged(self, lag_s: float, now: float) -> None:
        """Records that a timer fired, or a datagram was read, `lag_s` late."""
        if lag_s > 0 and lag_s >= self.lag_s(now):
            self._lag_s, self._lag_at = min(lag_s, LAG_MAX_S), now

    def lag_s(self, now: float) -> float:
        """Returns the largest recent lag, with exponential decay; 0 below `_LAG_NOTED_S`."""
        if not self._lag_s:
            return 0.0
        lag_s = self._lag_s * 0.5 ** ((now - self._lag_at) / _LAG_HALVES_S)
        return lag_s if lag_s >= _LAG_NOTED_S else 0.0


def missed_nacks(asked: int, nacks: int) -> int:
    """Returns the change of the health score by a failed probe: relays that sent no nack; without relays, 1.

    Source: memberlist's `probeNode`.
    """
    return max(0, asked - nacks) if asked else 1
