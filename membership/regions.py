"""Whom to probe and tell when the mesh spans regions: mostly neighbours, and each other region by a few of us.

A probe across an ocean costs more and says less, so three of four go to the own region. Towards each other region a few
nodes of every region stand watch, and the others look there now and then to know how far it is, newcomers at once; that keeps
an eye on a region that is lost as a whole, where nobody is left to tell. As soon as anybody there is suspected, all look there
at every second probe. News goes to neighbours first, but always abroad as well.
A mesh whose nodes name no region, or one, is probed and told as if there were none.
Source: the budget is our own; round-robin over a shuffled list is SWIM's (section 4.3).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING
from zlib import crc32

from membership.members import Member, Members
from mesh.ids import NodeId

if TYPE_CHECKING:
    from random import Random

WATCHERS = 3  # of each region towards each other region
ABROAD_EVERY = 4  # of a watcher's probes
MEASURE_EVERY = 16  # of everybody else's: so that all know how far it is
DOUBT_EVERY = 2  # of everybody's probes, while somebody abroad is suspected
NEAR_OF_THREE = 2  # of the peers that are told something at once


class Round:
    """Everybody once in random order, then again: it bounds the time until everyone had a turn, as drawing does not."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._round: list[NodeId] = []  # still to come, from the end

    def joined(self, node: NodeId) -> None:
        """A newcomer gets a random place in the round that is under way."""
        if node not in self._round:
            self._round.insert(self._rng.randint(0, len(self._round)), node)

    def following(self, peers: list[NodeId]) -> NodeId | None:
        """The next one of the sorted `peers`; others are passed over. None: there are none."""
        while self._round:
            node = self._round.pop()
            at = bisect_left(peers, node)
            if at < len(peers) and peers[at] == node:
                return node
        self._round = peers.copy()
        self._rng.shuffle(self._round)
        return self._round.pop() if self._round else None


class Patrol:
    """Whose turn it is to be probed by this node."""

    def __init__(self, rng: Random) -> None:
        self._near, self._abroad, self._doubted = Round(rng), Round(rng), Round(rng)
        self._turn = 0
        self._looked: set[str] = set()  # regions where a first probe went

    def joined(self, member: Member, members: Members) -> None:
        (self._near if member.region == members.region else self._abroad).joined(member.node)

    def next_target(self, members: Members) -> NodeId | None:
        """None: there is nobody."""
        if not members.abroad:
            return self._near.following(members.peers)
        self._turn += 1
        doubted = {members[node].region for node in members.suspects} - {members.region}
        if doubted and self._turn % DOUBT_EVERY == 0:
            return self._doubted.following(members.in_regions(doubted))
        if not members.near:
            return self._abroad.following(members.peers)
        if self._turn < MEASURE_EVERY and self._turn % 2 == 0 and (unseen := sorted(set(members.abroad) - self._looked)):
            self._looked.add(unseen[0])  # a newcomer first sees how far each region is
            return self._abroad.following(members.in_regions({unseen[0]}))
        mine = watched(members)
        if mine and self._turn % ABROAD_EVERY == 0:
            return self._abroad.following(members.in_regions(mine))
        if not mine and self._turn % MEASURE_EVERY == 0:
            return self._abroad.following(members.in_regions(set(members.abroad)))
        return self._near.following(members.near)


def watched(members: Members) -> set[str]:
    """The regions that this node watches for its own: of the ids here, `WATCHERS` from a place set by the region's name."""
    here = len(members.near) + 1
    place = bisect_left(members.near, members.me)
    return {region for region in members.abroad if (place - crc32(region.encode())) % here < WATCHERS}


def some_to_tell(members: Members, count: int, rng: Random, without: tuple[NodeId, ...] = ()) -> list[Member]:
    """Up to `count` peers at random, two of three in the own region where both kinds exist."""
    if not members.abroad:
        return members.some_peers(count, rng, without)
    near_count = max(0, min(count * NEAR_OF_THREE // 3, len(members.near)))
    near = members.some_peers(near_count, rng, without, among=members.near)
    abroad = members.some_peers(count - len(near), rng, without, among=members.in_regions(set(members.abroad)))
    if missing := count - len(near) - len(abroad):
        taken = (*without, *(member.node for member in near))
        near += members.some_peers(missing, rng, taken, among=members.near)
    return near + abroad


def some_relays(members: Members, count: int, rng: Random, target: NodeId) -> list[Member]:
    """Up to `count` peers to ask about `target`, of as many regions as can be: what is broken here may not be broken there."""
    if not members.abroad:
        return members.some_peers(count, rng, without=(target,))
    asked: dict[str, int] = {}  # of each region, so far
    drawn = []
    for member in members.some_peers(len(members.peers), rng, without=(target,)):
        drawn.append((asked.get(member.region, 0), member))
        asked[member.region] = asked.get(member.region, 0) + 1
    return [member for _, member in sorted(drawn, key=lambda each: each[0])][:count]
