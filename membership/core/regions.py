"""Which members to probe and inform when the mesh spans regions: mostly neighbours, and each other region by a few nodes.

A probe across an ocean costs more and shows less, so three of four go to the own region. A few nodes of each region probe each
other region regularly; the others probe there now and then, newcomers at once, to measure the round trip. So the loss of a whole
region, from which no report comes, is detected. As soon as a member there is suspected, all probe there
at every second probe. News goes to neighbours first, but always abroad as well.
A mesh whose nodes name no region, or one, is probed and informed as if there were none.
Source: the budget and the neighbour's turn are our own; round-robin in random order is SWIM's (section 4.3).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING
from zlib import crc32

from membership.core.members import Member, Members
from membership.core.roster import MemberIds
from mesh.ids import NodeId

if TYPE_CHECKING:
    from random import Random

WATCHERS = 3  # of each region towards each other region
ABROAD_EVERY = 4  # of a watcher's probes
MEASURE_EVERY = 16  # of the other nodes' probes: so that all have measured the round trip
DOUBT_EVERY = 2  # of every node's probes, while a member abroad is suspected
NEIGHBOURS = 4  # on the ring; the first of them that is not suspected already is probed
NEAR_OF_THREE = 2  # of the peers to which news is sent at once


class ProbeRound:
    """Visits every member once a round: this bounds the time until each is probed, as drawing at random does not.

    The order is that of the multiples of a stride that has no divisor with their number in common. So it takes no list of its
    own, and neither do ten thousand of them in a simulated mesh.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._rosters: tuple[MemberIds, ...] = ()  # that the round began with
        self._length = self._left = self._at = 0
        self._stride = 1
        self._newcomers: list[NodeId] = []
        self._known_newcomers: set[NodeId] = set()

    def joined(self, node: NodeId) -> None:
        """Gives a newcomer a random place in the round that is under way."""
        if node not in self._known_newcomers:
            self._known_newcomers.add(node)
            self._newcomers.append(node)

    def following(self, rosters: Sequence[MemberIds], me: NodeId) -> NodeId | None:
        """Returns the next member of these lists, never `me`; None if there is none."""
        as_begun = self._length > 0 and self._rosters == tuple(rosters)
        if not as_begun and sum(len(roster) - (me in roster) for roster in rosters) == 0:
            return None
        as_begun = as_begun and not self._known_newcomers  # then no member of the round can have gone meanwhile
        while True:
            node = self._next()
            if node is None:
                self._begin(rosters)
            elif node != me and (as_begun or any(node in roster for roster in rosters)):
                return node

    def _begin(self, rosters: Sequence[MemberIds]) -> None:
        self._rosters = tuple(rosters)
        self._newcomers, self._known_newcomers = [], set()
        self._left = self._length = length = sum(len(roster) for roster in rosters)
        self._at = self._rng.randrange(length)
        self._stride = self._rng.randrange(1, length) if length > 1 else 1
        while math.gcd(self._stride, length) != 1:
            self._stride = self._rng.randrange(1, length)

    def _next(self) -> NodeId | None:
        """Returns the next member of the round; None at its end."""
        waiting = len(self._newcomers)
        if waiting and self._rng.random() * (self._left + waiting) < waiting:
            return self._newcomers.pop(self._rng.randrange(waiting))
        if not self._left:
            return None
        at = self._at
        self._left, self._at = self._left - 1, (at + self._stride) % self._length
        for roster in self._rosters:
            if at < len(roster):
                return roster.ids[at]
            at -= len(roster)
        raise AssertionError("a place beyond the end")


class ProbeSchedule:
    """Chooses the member that this node probes next.

    In the own region every other probe goes to the next member on the ring: so each is probed by its neighbour every two
    periods. Without that, one in a hundred silent hosts would wait for its first probe for five periods.
    """

    def __init__(self, rng: Random) -> None:
        self._near, self._abroad, self._doubted = ProbeRound(rng), ProbeRound(rng), ProbeRound(rng)
        self._turn = 0
        self._neighbours_turn = False
        self._looked: set[str] = set()  # regions where a first probe went

    def joined(self, member: Member, members: Members) -> None:
        (self._near if member.region == members.region else self._abroad).joined(member.node)

    def next_target(self, members: Members) -> NodeId | None:
        """Returns the next member to probe; None if there is none."""
        if not members.abroad:
            return self._at_home(members)
        self._turn += 1
        doubted = {members[node].region for node in members.suspects} - {members.region}
        if doubted and self._turn % DOUBT_EVERY == 0:
            return self._doubted.following(members.in_regions(doubted), members.me)
        if len(members.near) < 2:
            return self._abroad.following(members.in_regions(members.abroad), members.me)
        if self._turn < MEASURE_EVERY and self._turn % 2 == 0 and (unseen := sorted(set(members.abroad) - self._looked)):
            self._looked.add(unseen[0])  # a newcomer first measures the round trip to each region
            return self._abroad.following(members.in_regions(unseen[:1]), members.me)
        mine = watched(members)
        if mine and self._turn % ABROAD_EVERY == 0:
            return self._abroad.following(members.in_regions(mine), members.me)
        if not mine and self._turn % MEASURE_EVERY == 0:
            return self._abroad.following(members.in_regions(members.abroad), members.me)
        return self._at_home(members)

    def _at_home(self, members: Members) -> NodeId | None:
        if len(members.near) < 2:
            return None
        self._neighbours_turn = not self._neighbours_turn
        if self._neighbours_turn:
            if not members.suspects:
                return members.near.after(members.me, 1)[0]
            neighbours = members.near.after(members.me, NEIGHBOURS)
            return next((node for node in neighbours if node not in members.suspects), neighbours[0])
        return self._near.following((members.near,), members.me)


def watched(members: Members) -> set[str]:
    """Returns the regions that this node watches: `WATCHERS` of the ids of its region, from a place set by each region's name."""
    here, place = len(members.near), bisect_left(members.near.ids, members.me)
    return {region for region in members.abroad if (place - crc32(region.encode())) % here < WATCHERS}


def some_gossip_peers(members: Members, count: int, rng: Random, without: tuple[NodeId, ...] = ()) -> list[NodeId]:
    """Returns up to `count` peers at random, two of three in the own region where both kinds exist."""
    if not members.abroad:
        return members.some_peers(count, rng, without)
    here, elsewhere = (members.near,), members.in_regions(members.abroad)
    near = members.some_peers(count * NEAR_OF_THREE // 3, rng, without, here)
    abroad = members.some_peers(count - len(near), rng, without, elsewhere)
    if missing := count - len(near) - len(abroad):
        near += members.some_peers(missing, rng, (*without, *near), here)
    return near + abroad


def some_relays(members: Members, count: int, rng: Random, target: NodeId) -> list[NodeId]:
    """Returns up to `count` relays for a probe of `target`, of as many regions as possible: their routes fail independently."""
    if not members.abroad:
        return members.some_peers(count, rng, without=(target,))
    regions = [members.near, *members.in_regions(members.abroad)]
    rng.shuffle(regions)
    drawn = [members.some_peers(count, rng, (target,), (region,)) for region in regions]
    return [node for turn in zip_longest(*drawn) for node in turn if node is not None][:count]
