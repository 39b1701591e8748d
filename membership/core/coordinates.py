"""Network coordinates: the distance between the points of two nodes estimates the round trip between them.

Each measured round trip pulls or pushes this node's point a little, by how sure both ends are; so round trips to peers that
were never probed can be estimated from points alone. A height stands for the way to the network's core, an adjustment for what no
geometry explains, gravity keeps the whole mesh from drifting away, and a median of three hides single late answers.
A peer's point is checked against bounds before it is used; no single point moves this node's farther than `STEP_MAX_S`.
Source: Dabek et al., "Vivaldi" (SIGCOMM 2004); Ledlie et al., "Network Coordinates in the Wild" (NSDI 2007) for the filter and
gravity; Lee et al., "On Suitability of Euclidean Embedding" (2010) for the adjustment; constants as in Serf.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from mesh.ids import NodeId

if TYPE_CHECKING:
    from random import Random

DIMENSIONS = 8
MAX_ERROR = 1.5  # of a node that has measured nothing; relative
CORRECTION = 0.25  # of the point, by one sample of full weight
ERROR_CORRECTION = 0.25
ADJUSTMENT_SAMPLES = 20
FILTER_SAMPLES = 3
HEIGHT_MIN_S = 10e-6
GRAVITY_S = 150.0
RTT_MAX_S = 10.0
NOTABLE_S = 0.01  # differences between shorter round trips do not matter: they are of one LAN
SETTLED_MISS = 0.3
_MISS_SHARE = 0.1
STEP_MAX_S = 0.1
_SAME_PLACE_S = 1e-6
_MIN_ERROR = 1e-6
_PACKED = struct.Struct(f">{DIMENSIONS + 3}e")  # half precision: 0.05 % of each number, up to 65 s in ms
COORDINATE_BYTES = _PACKED.size


class Coordinate(msgspec.Struct, frozen=True, gc=False):
    """A point, and how far it can be trusted. `error`: of its estimates, relative, 0 to 1.5."""

    vector_s: tuple[float, ...] = (0.0,) * DIMENSIONS
    height_s: float = HEIGHT_MIN_S
    error: float = MAX_ERROR
    adjustment_s: float = 0.0

    def raw_s(self, other: Coordinate) -> float:
        """The distance by geometry alone: between the points, and down both heights."""
        return math.dist(self.vector_s, other.vector_s) + self.height_s + other.height_s

    def distance_s(self, other: Coordinate) -> float:
        """The round trip to be expected between the two; above 0."""
        raw_s = self.raw_s(other)
        adjusted_s = raw_s + self.adjustment_s + other.adjustment_s
        return adjusted_s if adjusted_s > 0 else raw_s


def pack(point: Coordinate) -> bytes:
    """`COORDINATE_BYTES` bytes: milliseconds in half precision."""
    return _PACKED.pack(
        *[each_s * 1000 for each_s in point.vector_s], point.height_s * 1000, point.error, point.adjustment_s * 1000
    )


def unpack(raw: bytes) -> Coordinate | None:
    """Decodes a peer's point; None where it has the wrong size, is not finite, or is out of bounds."""
    if len(raw) != COORDINATE_BYTES:
        return None
    *vector_ms, height_ms, error, adjustment_ms = _PACKED.unpack(raw)
    point = Coordinate(tuple([each_ms / 1000 for each_ms in vector_ms]), height_ms / 1000, error, adjustment_ms / 1000)
    return point if is_sane(point) else None


def is_sane(point: Coordinate) -> bool:
    """Returns whether each number is within the bounds that measurements can lead to."""
    return (
        len(point.vector_s) == DIMENSIONS
        and all([-RTT_MAX_S <= each_s <= RTT_MAX_S for each_s in point.vector_s])  # false for NaN
        and 0 <= point.height_s <= RTT_MAX_S
        and 0 <= point.error <= MAX_ERROR
        and -RTT_MAX_S <= point.adjustment_s <= RTT_MAX_S
    )


class Position:
    """This node's own point, and what was measured of late."""

    def __init__(self, rng: Random, dimensions: int = DIMENSIONS) -> None:
        self._rng = rng
        self._origin = Coordinate((0.0,) * dimensions)
        self.point = self._origin
        self.samples = 0
        self._miss = 0.0  # of the predictions of late, relative to what was measured, or to what is notable
        self.refused = 0  # round trips and peers' points out of bounds
        self._latest_s: dict[NodeId, tuple[float, ...]] = {}  # a deque of three would take ten times the space
        self._off_s: deque[float] = deque([0.0] * ADJUSTMENT_SAMPLES, ADJUSTMENT_SAMPLES)

    @property
    def settled(self) -> bool:
        """This node's point predicts the round trips that it measures."""
        return self._miss < SETTLED_MISS

    def has_samples(self, node: NodeId) -> bool:
        """Returns whether round trips to this node are kept."""
        return node in self._latest_s

    def decoded(self, raw: bytes) -> Coordinate | None:
        """Decodes a peer's point; counts an invalid one in `refused` and returns None."""
        point = unpack(raw)
        self.refused += point is None
        return point

    def observe(self, node: NodeId, theirs: Coordinate, rtt_s: float) -> bool:
        """Moves this node's point by one round trip to `node`, whose point is `theirs`. False: out of bounds, no change."""
        if not 0 <= rtt_s <= RTT_MAX_S:
            self.refused += 1
            return False
        rtt_s = max(self._filtered_s(node, rtt_s), _SAME_PLACE_S)
        self.samples += 1
        miss = abs(self.point.distance_s(theirs) - rtt_s) / max(rtt_s, NOTABLE_S)
        self._miss += _MISS_SHARE * (min(1.0, miss) - self._miss)
        moved = self._pulled(theirs, rtt_s)
        self._off_s.append(max(-RTT_MAX_S, rtt_s - moved.raw_s(theirs)))
        adjustment_s = sum(self._off_s) / (2 * ADJUSTMENT_SAMPLES)
        moved = self._settled(Coordinate(moved.vector_s, moved.height_s, moved.error, adjustment_s))
        if len(moved.vector_s) != DIMENSIONS or is_sane(
            moved
        ):  # else the point is at the bounds already, where forged points may have moved it
            self.point = moved
        return True

    def forget(self, node: NodeId) -> None:
        self._latest_s.pop(node, None)

    def _filtered_s(self, node: NodeId, rtt_s: float) -> float:
        """The median of the last three to this node: a single answer that was delayed on a host does not count."""
        latest = self._latest_s[node] = (*self._latest_s.get(node, ()), rtt_s)[-FILTER_SAMPLES:]
        return sorted(latest)[len(latest) // 2]

    def _pulled(self, theirs: Coordinate, rtt_s: float) -> Coordinate:
        mine = self.point
        distance_s = mine.distance_s(theirs)
        off = abs(distance_s - rtt_s) / rtt_s
        weight = mine.error / max(mine.error + theirs.error, _MIN_ERROR)
        share = ERROR_CORRECTION * weight
        error = min(MAX_ERROR, off * share + mine.error * (1 - share))
        force_s = CORRECTION * weight * (rtt_s - distance_s)
        force_s = min(STEP_MAX_S, max(-STEP_MAX_S, force_s))
        return self._pushed(Coordinate(mine.vector_s, mine.height_s, error, mine.adjustment_s), theirs, force_s)

    def _settled(self, point: Coordinate) -> Coordinate:
        """Gravity: the farther out, the harder, so that a mesh does not drift as a whole."""
        distance_s = self._origin.distance_s(point)
        return self._pushed(point, self._origin, -((distance_s / GRAVITY_S) ** 2))

    def _pushed(self, point: Coordinate, away_from: Coordinate, force_s: float) -> Coordinate:
        apart_s = math.dist(point.vector_s, away_from.vector_s)
        if apart_s > _SAME_PLACE_S:
            share = force_s / apart_s
            vector_s = tuple([mine + (mine - theirs) * share for mine, theirs in zip(point.vector_s, away_from.vector_s)])
            rise_s = min(STEP_MAX_S, max(-STEP_MAX_S, (point.height_s + away_from.height_s) * share))
            height_s = max(HEIGHT_MIN_S, point.height_s + rise_s)
            return Coordinate(vector_s, height_s, point.error, point.adjustment_s)
        # Two equal points have no direction between them: a random one separates them.
        direction = [self._rng.random() - 0.5 for _ in point.vector_s]
        length = math.hypot(*direction) or 1.0
        vector_s = tuple(mine + each * force_s / length for mine, each in zip(point.vector_s, direction))
        return Coordinate(vector_s, point.height_s, point.error, point.adjustment_s)
