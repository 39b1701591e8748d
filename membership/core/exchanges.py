"""Decides when to exchange digests with a peer. A digest covers all members, so exchanges are limited in rate.

The limits are for each peer and for this node. Different fingerprints alone start no exchange while rumours are spreading: in a
mesh of thousands each death would start one on every node, and the rumour would arrive before the answer.
"""

from __future__ import annotations

from membership.core.config import MembershipConfig
from mesh.ids import Address

_REMEMBERED = 1024  # peers whose last exchange is remembered
_NEVER = -1e9


class Exchanges:
    """Limits the rate of exchanges of one node."""

    def __init__(self, config: MembershipConfig, now: float) -> None:
        self._config = config
        self._asked_at: dict[Address, float] = {}
        self._last_at = _NEVER
        self._held, self._held_since = 0, now  # the fingerprint last noted, and since when it has not changed

    def take(self, address: Address, now: float) -> bool:
        """Returns whether an exchange with this peer may begin; if so, it counts as begun."""
        if now - self._last_at < self._config.exchange_pace_s:
            return False
        if now - self._asked_at.get(address, _NEVER) < self._config.exchange_gap_s:
            return False
        if len(self._asked_at) >= _REMEMBERED:
            self._asked_at.clear()
        self._asked_at[address] = self._last_at = now
        return True

    def note(self, fingerprint: int, now: float) -> None:
        """Records this node's own fingerprint."""
        if fingerprint != self._held:
            self._held, self._held_since = fingerprint, now

    def settled(self, live: int, now: float) -> bool:
        """Returns whether the fingerprint has not changed for so long that no spreading rumour will change it."""
        return now - self._held_since >= self._config.exchange_patience_s * live
