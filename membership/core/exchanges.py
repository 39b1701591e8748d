"""Decides when to compare all knowledge with a peer, which costs a digest of all members.

Each peer, and this node, has one only so often. A difference alone is no reason while news is on its way: in a mesh of thousands
every death would make all of them ask all others, and the rumour has reached them before the answer.
"""

from __future__ import annotations

from membership.core.config import MembershipConfig
from mesh.ids import Address

_REMEMBERED = 1024  # peers, and when each was asked
_NEVER = -1e9


class Exchanges:
    def __init__(self, config: MembershipConfig, now: float) -> None:
        self._config = config
        self._asked_at: dict[Address, float] = {}
        self._last_at = _NEVER
        self._held, self._held_since = 0, now  # the fingerprint last noted, and since when it has not changed

    def take(self, address: Address, now: float) -> bool:
        """Whether an exchange with this peer may begin; if so, it counts as begun."""
        if now - self._last_at < self._config.exchange_pace_s:
            return False
        if now - self._asked_at.get(address, _NEVER) < self._config.exchange_gap_s:
            return False
        if len(self._asked_at) >= _REMEMBERED:
            self._asked_at.clear()
        self._asked_at[address] = self._last_at = now
        return True

    def note(self, fingerprint: int, now: float) -> None:
        """What this node's own fingerprint is now."""
        if fingerprint != self._held:
            self._held, self._held_since = fingerprint, now

    def settled(self, live: int, now: float) -> bool:
        """The fingerprint noted last has been what it is for so long that no rumour on its way will change it."""
        return now - self._held_since >= self._config.exchange_patience_s * live
