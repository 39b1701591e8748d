"""Estimates the round trip to each member: measured, else from its point, else the average of its region.

Points ride on pings, and on the acks of such pings: on each while this node's point does not predict what it measures, then on
every sixteenth, which costs 6 bytes a second; in a LAN that is soon. An exchange brings the points of all to a newcomer at once.
Source: Serf carries its coordinates in acks; the rest is our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from membership.core.coordinates import Coordinate, Position, pack
from membership.core.members import Member

if TYPE_CHECKING:
    from random import Random

FIRST_SAMPLES = 8
SETTLED_EVERY = 16  # pings
LOST_EVERY = 4  # pings of a node whose point does not settle
LOST_SAMPLES = 512  # after so many its point counts as one that does not settle
VAGUE_ERROR = 0.5  # relative; points with a larger error are worse than the average of a named region
_MAX_REGIONS = 256
_REGION_SHARE = 0.125  # of one measured round trip in its region's average


class Distances:
    """This node's point, and the measured round trips to others."""

    def __init__(self, rng: Random) -> None:
        self.position = Position(rng)
        self._pings = 0
        self._packed: tuple[Coordinate | None, bytes] = None, b""
        self._region_s: dict[str, float] = {}

    def point_for_ping(self) -> bytes | None:
        """Returns this node's point for the next ping, or None where the ping carries none."""
        self._pings += 1
        samples, settled = self.position.samples, self.position.settled
        every = 1 if samples < FIRST_SAMPLES else SETTLED_EVERY if settled else 1 if samples < LOST_SAMPLES else LOST_EVERY
        return None if self._pings % every else self._here()

    def point_for_ack(self, asked: bytes | None) -> bytes | None:
        """Returns this node's point for the ack of a ping that carried one."""
        return None if asked is None else self._here()

    def _here(self) -> bytes:
        point, packed = self._packed
        if point is not self.position.point:  # unchanged for several pings and acks
            point, packed = self._packed = self.position.point, pack(self.position.point)
        return packed

    def store_point(self, member: Member, where: bytes | None) -> None:
        """Stores a member's coordinate, from its own message or another member's record."""
        if where is not None and (point := self.position.decoded(where)) is not None:
            member.point = point

    def measured(self, member: Member, rtt_s: float, where: bytes | None, *, lagging: bool) -> None:
        """Stores a round trip measured by a direct ack. `lagging`: the member or this node was delayed by its host."""
        member.rtt_s = rtt_s
        self.store_point(member, where)
        if lagging:
            return
        if member.region in self._region_s or len(self._region_s) < _MAX_REGIONS:
            before_s = self._region_s.get(member.region, rtt_s)
            self._region_s[member.region] = before_s + _REGION_SHARE * (rtt_s - before_s)
        if where is not None and member.point is not None:
            self.position.observe(member.node, member.point, rtt_s)

    def forget(self, member: Member) -> None:
        """Drops all measurements of a member that moved or is gone."""
        member.rtt_s = member.point = None
        self.position.forget(member.node)

    def estimate_s(self, member: Member) -> float | None:
        """The round trip to be expected without asking: by the points, else by others of its region. None: unknown."""
        point, average_s = member.point, self._region_s.get(member.region)
        if point is None or not self.position.samples:
            return average_s
        vague = member.region and max(point.error, self.position.point.error) > VAGUE_ERROR
        return average_s if vague and average_s is not None else self.position.point.distance_s(point)

    def expected_s(self, member: Member) -> float:
        """Measured, else estimated; 0 without either."""
        if member.rtt_s is not None:
            return member.rtt_s
        return self.estimate_s(member) or 0.0
