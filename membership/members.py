"""The table of members and the order of claims: which of two statements about a node is the later one.

(epoch, incarnation, severity) grows only: a restart beats anything said of the run before, a refutation beats
any accusation of its incarnation, and among equals the graver claim wins. What a node is called and where
it lives has an order of its own, that of its own Alive claims. Both are maxima, so members that heard the same
claims agree whatever the order, the number of copies, or the way they came.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from membership.coordinates import Coordinate, pack
from membership.fingerprint import Fingerprint
from membership.suspicion import Suspicion
from mesh.gossip import LISTENS, TIMEOUT, Alive, Claim, Dead, Left, Suspect
from mesh.ids import Address, NodeId
from mesh.sync import MemberRecord
from mesh.view import Load, PeerState

if TYPE_CHECKING:
    from random import Random

SEVERITY = {PeerState.ALIVE: 0, PeerState.SUSPECT: 1, PeerState.DEAD: 2, PeerState.LEFT: 3}
LIVE = (PeerState.ALIVE, PeerState.SUSPECT)
_STATE_OF: dict[type, PeerState] = {
    Alive: PeerState.ALIVE,
    Suspect: PeerState.SUSPECT,
    Dead: PeerState.DEAD,
    Left: PeerState.LEFT,
}

Standing = tuple[int, int, int]
"""(epoch, incarnation, severity): compares as tuples do."""

Description = tuple[int, int, str, str, int, str]
"""(epoch, incarnation, name, host, port, region): likewise; the tail only breaks ties between liars."""


def state_of(claim: Claim) -> PeerState:
    return _STATE_OF[type(claim)]


def standing_of(claim: Claim) -> Standing:
    return claim.epoch, claim.incarnation, SEVERITY[state_of(claim)]


def description_of(claim: Alive | MemberRecord) -> Description:
    return claim.epoch, claim.incarnation, claim.name, claim.host, claim.port, claim.region


@dataclass(slots=True)
class Member:
    """A peer as membership records it; also this node itself."""

    node: NodeId
    description: Description
    epoch: int
    incarnation: int
    state: PeerState
    since: float  # when it came into this state, local monotonic seconds
    heard_at: float = -math.inf  # last datagram or answer of its own
    suspicion: Suspicion | None = None
    load: Load = field(default_factory=Load)
    load_at: float = 0.0
    rtt_s: float | None = None  # last measured
    point: Coordinate | None = None  # where it is, as it said last
    cause: str = ""  # of its death, or of a suspicion that says more than silence
    lag_s: float = 0.0  # as it admits
    key: bytes = b""  # the first heard, for good
    signature: bytes = b""  # its own: under its goodbye once it has left, else under its description

    @property
    def standing(self) -> Standing:
        return self.epoch, self.incarnation, SEVERITY[self.state]

    @property
    def name(self) -> str:
        return self.description[2]

    @property
    def address(self) -> Address:
        return self.description[3], self.description[4]

    @property
    def region(self) -> str:
        return self.description[5]

    @property
    def live(self) -> bool:
        return self.state in LIVE

    def alive_claim(self) -> Alive:
        """Its latest own words about itself, as far as they were heard."""
        key = self.key if self.description[1] == 0 else b""
        return Alive(self.node, *self.description, self.signature, key)

    def claim(self, me: NodeId) -> Claim:
        """What this node would tell of it now."""
        match self.state:
            case PeerState.ALIVE:
                return self.alive_claim()
            case PeerState.SUSPECT:
                # Its own name stands for an accuser that is not known.
                first = self.suspicion.first if self.suspicion else None
                listens = self.suspicion is not None and self.suspicion.listens
                return Suspect(self.node, self.epoch, self.incarnation, first or self.node, listens)
            case PeerState.DEAD:
                return Dead(self.node, self.epoch, self.incarnation, me, self.cause or TIMEOUT)
            case PeerState.LEFT:
                return Left(self.node, self.epoch, self.incarnation, self.signature)

    def record(self, now: float) -> MemberRecord:
        _, _, name, host, port, region = self.description
        age_s = max(0.0, now - self.since)
        return MemberRecord(
            self.node,
            self.epoch,
            self.incarnation,
            self.state,
            name,
            host,
            port,
            region,
            age_s,
            LISTENS if self.suspicion is not None and self.suspicion.listens else self.cause,
            pack(self.point) if self.point is not None else None,
            self.key,
            self.signature,
        )


class Members:
    """All members by id, this node included, with what probing needs of them at hand."""

    def __init__(self, myself: Member, fingerprint: Fingerprint) -> None:
        self.me = myself.node
        self.fingerprint = fingerprint
        self._by_id: dict[NodeId, Member] = {}
        self._peers: list[NodeId] | None = None
        self.suspects: set[NodeId] = set()
        self.gone: set[NodeId] = set()  # dead, or left
        self.region = myself.region
        self.abroad: dict[str, set[NodeId]] = {}  # live members of other regions, by region
        self._near: list[NodeId] | None = None
        self.put(myself)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._by_id.values())

    def __contains__(self, node: NodeId) -> bool:
        return node in self._by_id

    def get(self, node: NodeId) -> Member | None:
        return self._by_id.get(node)

    def __getitem__(self, node: NodeId) -> Member:
        return self._by_id[node]

    def put(self, member: Member) -> None:
        """Records a newcomer, or that a known member's state, standing or region changed."""
        self._by_id[member.node] = member
        self._peers = self._near = None
        self._locate(member.node, member.region if member.live else self.region)
        if member.state is PeerState.SUSPECT:
            self.suspects.add(member.node)
        else:
            self.suspects.discard(member.node)
        if member.live:
            self.gone.discard(member.node)
            self.fingerprint.live(member.node, member.epoch, member.incarnation)
        else:
            self.gone.add(member.node)
            self.fingerprint.gone(member.node)

    def forget(self, node: NodeId) -> None:
        del self._by_id[node]
        self._peers = self._near = None
        self._locate(node, self.region)
        self.suspects.discard(node)
        self.gone.discard(node)
        self.fingerprint.forget(node)

    @property
    def peers(self) -> list[NodeId]:
        """Live members other than this node, in an order that depends on nothing but who they are."""
        if self._peers is None:
            self._peers = sorted(m.node for m in self._by_id.values() if m.live and m.node != self.me)
        return self._peers

    @property
    def live_count(self) -> int:
        """This node included."""
        return len(self.peers) + 1

    @property
    def near(self) -> list[NodeId]:
        """Those of `peers` that are in this node's own region, in the same order."""
        if not self.abroad:
            return self.peers
        if self._near is None:
            self._near = [node for node in self.peers if self._by_id[node].region == self.region]
        return self._near

    def in_regions(self, regions: set[str]) -> list[NodeId]:
        """Live members of these other regions, sorted."""
        return sorted(node for region in regions for node in self.abroad.get(region, ()))

    def _locate(self, node: NodeId, region: str) -> None:
        for other in [name for name, nodes in self.abroad.items() if node in nodes and name != region]:
            self.abroad[other].discard(node)
            if not self.abroad[other]:
                del self.abroad[other]
        if region != self.region:
            self.abroad.setdefault(region, set()).add(node)

    def some_peers(
        self, count: int, rng: Random, without: tuple[NodeId, ...] = (), among: list[NodeId] | None = None
    ) -> list[Member]:
        """Up to `count` different live peers, or of the peers `among`, uniformly at random, none of `without`."""
        among = self.peers if among is None else among
        drawn = rng.sample(among, min(len(among), count + len(without)))
        return [self._by_id[node] for node in drawn if node not in without][:count]

    def oldest_tombstone(self) -> NodeId | None:
        gone = [self._by_id[node] for node in self.gone if node != self.me]
        return min(gone, key=lambda m: (m.since, m.node)).node if gone else None
