"""How far each member is: measured, else told from its point, else as far as its region is.

Points ride on pings, and on the acks of such pings: on each of the first, then on fewer, then on every sixteenth, which costs
6 bytes a second. An exchange brings the points of all to a newcomer at once.
Source: Serf carries its coordinates in acks; the rest is our own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from membership.coordinates import Position, pack
from membership.members import Member

if TYPE_CHECKING:
    from random import Random

TOLD_EVERY = ((8, 1), (32, 4), (math.inf, 16))  # up to so many samples: on each so many-th ping
_REGIONS_MAX = 256
_REGION_SHARE = 0.125  # of one measured round trip in its region's average


class Distances:
    """This node's place, and what was measured of the ways to others."""

    def __init__(self, rng: Random) -> None:
        self.position = Position(rng)
        self._pings = 0
        self._region_s: dict[str, float] = {}

    def told_with_ping(self) -> bytes | None:
        """What the next ping says of where this node is."""
        self._pings += 1
        every = next(every for samples, every in TOLD_EVERY if self.position.samples < samples)
        return None if self._pings % every else pack(self.position.point)

    def told_with_ack(self, asked: bytes | None) -> bytes | None:
        """Whoever says where it is wants to hear where we are."""
        return None if asked is None else pack(self.position.point)

    def heard(self, member: Member, where: bytes | None) -> None:
        """The member said, or somebody said of it, where it is."""
        if where is not None and (point := self.position.told(where)) is not None:
            member.point = point

    def measured(self, member: Member, rtt_s: float, where: bytes | None, *, lagging: bool) -> None:
        """An ack came straight from the member. `lagging`: it, or we, were late for reasons other than the way."""
        member.rtt_s = rtt_s
        self.heard(member, where)
        if lagging:
            return
        if member.region in self._region_s or len(self._region_s) < _REGIONS_MAX:
            before_s = self._region_s.get(member.region, rtt_s)
            self._region_s[member.region] = before_s + _REGION_SHARE * (rtt_s - before_s)
        if where is not None and member.point is not None:
            self.position.observe(member.node, member.point, rtt_s)

    def forget(self, member: Member) -> None:
        """It runs elsewhere now, or is gone: nothing measured before holds."""
        member.rtt_s = member.point = None
        self.position.forget(member.node)

    def estimate_s(self, member: Member) -> float | None:
        """The round trip to be expected without asking: by the points, else by others of its region. None: nobody knows."""
        if member.point is not None and self.position.samples > 0:
            return self.position.point.distance_s(member.point)
        return self._region_s.get(member.region)

    def expected_s(self, member: Member) -> float:
        """Measured, else estimated; 0 without either."""
        if member.rtt_s is not None:
            return member.rtt_s
        return self.estimate_s(member) or 0.0
