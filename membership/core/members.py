"""The table of members and the order of claims: which of two claims about a node is the later one.

(epoch, incarnation, severity) only grows: a restart overrides all claims about the earlier run, a refutation overrides all
accusations of its incarnation, and among equals the more severe claim wins. Name and address of a node have an order of their
own, that of its own Alive claims. Both are maxima, so members that received the same claims agree whatever the order, the
number of copies, or the route of the claims.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from membership.core.coordinates import Coordinate, pack
from membership.core.roster import MemberIds, some_of
from membership.core.suspicion import Suspicion
from membership.facts.fingerprint import Fingerprint
from mesh.ids import Address, NodeId
from mesh.view import Load, PeerState
from mesh.wire.gossip import LISTENS, TIMEOUT, ZERO_LOAD, Alive, Claim, Dead, Left, Suspect
from mesh.wire.sync import MemberRecord

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

MemberPrecedence = tuple[int, int, int]
"""(epoch, incarnation, severity): compares as tuples do."""

Description = tuple[int, int, str, str, int, str]
"""(epoch, incarnation, name, host, port, region): likewise; the tail only breaks ties between contradictory claims."""


def state_of(claim: Claim) -> PeerState:
    """Returns the state that the claim asserts."""
    return _STATE_OF[type(claim)]


def standing_of(claim: Claim) -> MemberPrecedence:
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
    since: float  # start of this state, local monotonic seconds
    last_message_at: float = -math.inf  # last datagram or answer that the member itself sent
    suspicion: Suspicion | None = None
    load: Load = ZERO_LOAD
    load_at: float = 0.0
    rtt_s: float | None = None  # last measured
    point: Coordinate | None = None  # its network coordinate, as it last reported
    cause: str = ""  # of its death, or of a suspicion with other evidence than silence
    lag_s: float = 0.0  # as it reports
    key: bytes = b""  # public key: the first received, never replaced
    signature: bytes = b""  # its own: of its Left claim once it has left, else of its description
    listed_in: str | None = None  # the region whose list of live members contains it
    corrected: tuple[float, list[Claim]] | None = None  # the last corrections sent to it, and when

    @property
    def standing(self) -> MemberPrecedence:
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
        """Returns its latest own Alive claim that was received."""
        key = self.key if self.description[1] == 0 else b""
        return Alive(self.node, *self.description, self.signature, key)

    def claim(self, me: NodeId) -> Claim:
        """Returns the claim about the member that this node sends now."""
        match self.state:
            case PeerState.ALIVE:
                return self.alive_claim()
            case PeerState.SUSPECT:
                # The member's own id stands for an unknown accuser.
                first = self.suspicion.first if self.suspicion else None
                listens = self.suspicion is not None and self.suspicion.listens
                return Suspect(self.node, self.epoch, self.incarnation, first or self.node, listens)
            case PeerState.DEAD:
                return Dead(self.node, self.epoch, self.incarnation, me, self.cause or TIMEOUT)
            case PeerState.LEFT:
                return Left(self.node, self.epoch, self.incarnation, self.signature)

    def needs_corrections(self, corrections: list[Claim], now: float, gap_s: float) -> bool:
        """Returns whether to send the corrections: not if the same were sent within `gap_s`. Two nodes that correct each other
        without effect would otherwise send without end.
        """
        if self.corrected is not None and self.corrected[1] == corrections and now - self.corrected[0] < gap_s:
            return False
        self.corrected = now, corrections
        return True

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


_NONE = MemberIds()


class Members:
    """All members by id, this node included, with the lists that probing draws from."""

    def __init__(self, myself: Member, fingerprint: Fingerprint) -> None:
        self.me = myself.node
        self.fingerprint = fingerprint
        self._by_id: dict[NodeId, Member] = {}
        self.region = myself.region
        self.roster = self.near = _NONE  # live members, and those of this node's region; this node included
        self.abroad: dict[str, MemberIds] = {}  # live members of other regions, by region; no list is empty
        self.suspects: set[NodeId] = set()
        self.gone: set[NodeId] = set()  # dead, or left
        self.put(myself)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Member]:
        """For reading only."""
        return iter(self._by_id.values())

    def __contains__(self, node: NodeId) -> bool:
        return node in self._by_id

    def get(self, node: NodeId) -> Member | None:
        return self._by_id.get(node)

    def __getitem__(self, node: NodeId) -> Member:
        member = self.get(node)
        if member is None:
            raise KeyError(node)
        return member

    def peek(self, node: NodeId) -> Member | None:
        """For reading only: a table in the simulator shares records."""
        return self._by_id.get(node)

    def address_of(self, node: NodeId) -> Address:
        """The address of a member, by `peek`."""
        member = self.peek(node)
        if member is None:
            raise KeyError(node)
        return member.address

    def put(self, member: Member) -> None:
        """Stores a newcomer, or a member whose state, precedence or region changed, and updates the lists."""
        if (before := self.peek(member.node)) is not None:
            member.listed_in = before.listed_in
        self._by_id[member.node] = member
        self._list(member, member.region if member.live else None)
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
        if (member := self.get(node)) is not None:
            self._list(member, None)
        self._by_id.pop(node, None)
        self.suspects.discard(node)
        self.gone.discard(node)
        self.fingerprint.forget(node)

    @property
    def live_count(self) -> int:
        """This node included."""
        return len(self.roster)

    def in_regions(self, regions: Iterable[str]) -> list[MemberIds]:
        """The lists of these other regions, in the order of their names."""
        return [self.abroad[region] for region in sorted(regions) if region in self.abroad]

    def some_peers(
        self, count: int, rng: Random, without: tuple[NodeId, ...] = (), among: Sequence[MemberIds] | None = None
    ) -> list[NodeId]:
        """Up to `count` different live peers, or of those `among`, uniformly at random, none of `without`, nor this node."""
        return some_of((self.roster,) if among is None else among, count, rng, (self.me, *without))

    def _list(self, member: Member, region: str | None) -> None:
        """Puts the member on the list of this region, and on no other. None: it is not live."""
        node, before = member.node, member.listed_in
        if before == region:
            return
        member.listed_in = region
        if before is not None:
            self._relist(before, self._regional(before).lacking(node))
        if region is not None:
            self._relist(region, self._regional(region).having(node))
        self.roster = self.roster.lacking(node) if region is None else self.roster.having(node)

    def _regional(self, region: str) -> MemberIds:
        return self.near if region == self.region else self.abroad.get(region) or _NONE

    def _relist(self, region: str, roster: MemberIds) -> None:
        if region == self.region:
            self.near = roster
        elif len(roster):
            self.abroad[region] = roster
        else:
            del self.abroad[region]

    def oldest_tombstone(self) -> NodeId | None:
        gone = [self[node] for node in self.gone if node != self.me]
        return min(gone, key=lambda m: (m.since, m.node)).node if gone else None
