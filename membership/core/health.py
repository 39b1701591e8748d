"""How well this node itself does: Lifeguard's local health, and the lag it can measure and admits to its peers.

A node that is slow sees silence everywhere. Its score grows with each sign that the fault is its own (a relay's nack that
did not come, a suspicion of itself to refute) and stretches all it waits for. The lag is measured, not inferred: how late
timers fire, and how long datagrams had lain in the socket, by the kernel's stamp; peers that are told wait longer.
Source: Lifeguard (arXiv 1707.00788), section IV-A, with memberlist's rules; the admitted lag is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_SCORE = 8
LAG_MAX_S = 5.0  # no admitted lag buys more patience than this
_LAG_NOTED_S = 0.02  # below it is what any scheduler does
_LAG_HALVES_S = 5.0


@dataclass(slots=True)
class LocalHealth:
    """`score`: 0 (well) to 8."""

    score: int = 0
    _lag_s: float = 0.0
    _lag_at: float = 0.0

    @property
    def factor(self) -> int:
        """By how much probes are stretched."""
        return 1 + self.score

    def note(self, change: int) -> None:
        """-1 for a probe that was answered; above 0 for signs of our own fault."""
        self.score = min(MAX_SCORE, max(0, self.score + change))

    def lagged(self, lag_s: float, now: float) -> None:
        """A timer fired, or a datagram was read, so much later than it could have been."""
        if lag_s > 0 and lag_s >= self.lag_s(now):
            self._lag_s, self._lag_at = min(lag_s, LAG_MAX_S), now

    def lag_s(self, now: float) -> float:
        """The worst of late, fading; 0 when there is none to speak of."""
        if not self._lag_s:
            return 0.0
        lag_s = self._lag_s * 0.5 ** ((now - self._lag_at) / _LAG_HALVES_S)
        return lag_s if lag_s >= _LAG_NOTED_S else 0.0


def missed_nacks(asked: int, nacks: int) -> int:
    """What a failed probe says of ourselves: relays that owed us a nack and sent none; without relays, 1.

    Source: memberlist's `probeNode`.
    """
    return max(0, asked - nacks) if asked else 1
