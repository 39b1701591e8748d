"""Death by the kernel's own word: a link that ended, and a host that says nobody listens there any more.

A killed process takes its sockets with it: within milliseconds its links end and new connections are refused, while silence
takes a failure detector seconds to believe. Rules that keep this safe: a case is opened only by the end of a link whose
handshake had named the peer; this node must be refused itself, and two relays as well (fewer only where the mesh has
fewer), since one firewall may lie to one of us; the verdict names the incarnation that the case was opened on, so whoever
lives refutes it, and a restarted one has a higher epoch. A host that is gone refuses nothing: silence has its own way.
Hearsay of such a death is believed at once, except by those who hold a link to the dead: they look for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from membership.core.claims import ClaimProcessing
from membership.core.config import MembershipConfig
from membership.core.effects import Effect, MemberChanged, SendDatagram, TryConnect, WatchLinks
from membership.core.members import Member
from membership.core.roster import MemberIds
from membership.facts.fingerprint import Fingerprint
from mesh.ids import Address, NodeId
from mesh.keys.signing import Signer
from mesh.view import PeerState
from mesh.wire.gossip import REFUSED, Alive, ConnectCheck, ConnectChecked, Dead, Suspect

if TYPE_CHECKING:
    from random import Random

RELAYS_ASKED = 3
REFUSALS_NEEDED = 2  # of the relays asked
CASE_S = 2.0  # evidence older than this proves nothing together
MAX_ERRANDS = 256  # connections tried at once, for ourselves and for others


@dataclass(slots=True)
class RefusalCase:
    """What speaks for the death of one node."""

    number: int  # of the connection that this node tries, and of what it asks of relays
    node: NodeId
    epoch: int
    incarnation: int
    opened_at: float
    hearsay: bool  # somebody's verdict fell already: our own refusal is enough
    refused_here: bool = False
    relays: set[NodeId] = field(default_factory=set)
    refusals: set[NodeId] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ConnectProbe:
    """A connection being tried: for our own case on `node`, or for the asker."""

    node: NodeId
    asker: Address | None
    asker_seq: int
    started_at: float


class RefusalDetection(ClaimProcessing):
    """Watches ring neighbours over links, and weighs what their ends mean."""

    def __init__(
        self, me: Alive, signer: Signer, config: MembershipConfig, rng: Random, now: float, fingerprint: Fingerprint
    ) -> None:
        super().__init__(me, signer, config, rng, now, fingerprint)
        self.watched: tuple[tuple[NodeId, Address], ...] = ()
        self._ring: MemberIds | None = None  # that `watched` was taken from
        self.cases: dict[NodeId, RefusalCase] = {}
        self._errands: dict[int, ConnectProbe] = {}
        self._errand_number = 0
        self.refused_deaths = 0

    def spread(self, now: float, without: tuple[NodeId, ...] = ()) -> list[Effect]:
        if not (self._changes or self._news or self.doubted):
            return []  # as after nearly every datagram
        effects = super().spread(now, without)
        if self.doubted:
            effects += self._verify_hearsay(now)
        if not effects:
            return effects
        changed = [effect for effect in effects if isinstance(effect, MemberChanged)]
        for change in changed:
            if change.after is PeerState.SUSPECT and change.before is not PeerState.SUSPECT:
                member = self.members.get(change.node)
                effects += self._look(member, now) if member is not None and self._watches(member, now) else []
        return effects + self.watch() if changed else effects

    def look_again(self, now: float) -> list[Effect]:
        """At stalled suspects: one that has stopped listening is no longer given the benefit of the doubt."""
        self._drop_old(now)
        stalled = [m for m in self.suspected() if m.suspicion and m.suspicion.stalled and self._watches(m, now)]
        return [effect for member in stalled for effect in self._look(member, now)]

    def _watches(self, member: Member, now: float) -> bool:
        return member.node in self.linked and self._open_case(member, now) is None

    def _open_case(self, member: Member, now: float) -> RefusalCase | None:
        """On what the member is now: one of a former run, or too old to prove anything, is none."""
        case = self.cases.get(member.node)
        fits = case is not None and now - case.opened_at < CASE_S and (case.epoch, case.incarnation) == member.standing[:2]
        return case if fits else None

    def _look(self, member: Member, now: float) -> list[Effect]:
        """One of those who watch a new suspect: does its process exist at all?"""
        number = self._errand(member.node, None, 0, now)
        return [TryConnect(number, member.address)] if number is not None else []

    def ring_successors(self, count: int) -> list[NodeId]:
        """The live members that follow this node in the order of ids, which are random: neighbours share no rack."""
        return self.members.roster.after(self.me, count)

    def watch(self, *, again: bool = False) -> list[Effect]:
        """Asks the shell to keep links to the ring successors; `again`: also to those it was asked for before."""
        if again and self.members.roster is self._ring and all([node in self.linked for node, _ in self.watched]):
            return []  # a change of any member would have brought us here without `again`
        self._ring = self.members.roster
        watched = tuple((node, self.members.address_of(node)) for node in self.ring_successors(self.config.watched_peers))
        if watched == self.watched and not (again and any(node not in self.linked for node, _ in watched)):
            return []
        self.watched = watched
        return [WatchLinks(tuple(address for _, address in watched))]

    def link_made(self, node: NodeId) -> None:
        """A link with `node` is open, its handshake done. Ends with `lost(…, proven=True)`."""
        self.linked[node] = self.linked.get(node, 0) + 1

    def open_case(self, member: Member, now: float, *, hearsay: bool = False) -> list[Effect]:
        """A link ended, or somebody tells of a death: see whether the node's host refuses us."""
        if (case := self._open_case(member, now)) is not None:
            case.hearsay |= hearsay
            self._judge(case, now)
            return []
        number = self._errand(member.node, None, 0, now)
        if number is None:
            return []
        self.cases[member.node] = RefusalCase(number, member.node, member.epoch, member.incarnation, now, hearsay)
        return [TryConnect(number, member.address)]

    def close_case(self, node: NodeId) -> None:
        """The node answered what was asked after its case was opened: it lives."""
        self.cases.pop(node, None)

    def _verify_hearsay(self, now: float) -> list[Effect]:
        """Looks at the deaths just heard of whose victims still have a link with this node."""
        nodes, self.doubted = self.doubted, []
        still_there = [member for node in nodes if (member := self.members.get(node)) is not None and member.live]
        return [effect for member in still_there for effect in self.open_case(member, now, hearsay=True)]

    def on_tried(self, number: int, refused: bool | None, now: float) -> list[Effect]:
        """The connection of a `TryConnect` was refused (True), came about (False), or got no answer (None)."""
        errand = self._errands.pop(number, None)
        if errand is None:
            return []
        if errand.asker is not None:
            return [
                SendDatagram(errand.asker, self.filled(ConnectChecked(self.sender(now), errand.asker_seq, refused is True), ()))
            ]
        self._seen(errand.node, refused, now)
        case = self.cases.get(errand.node)
        if case is None or case.number != number:
            return []
        if refused is not True:
            del self.cases[errand.node]
            return []
        case.refused_here = True
        relays = [] if case.hearsay else self.members.some_peers(RELAYS_ASKED, self.rng, without=(errand.node,))
        case.relays = set(relays)
        self._judge(case, now)
        knock = ConnectCheck(self.sender(now), number, errand.node)
        return [SendDatagram(self.members.address_of(relay), self.filled(knock, ())) for relay in relays]

    def _seen(self, node: NodeId, refused: bool | None, now: float) -> None:
        """What a connection of our own says of a suspect's process."""
        member = self.members.get(node)
        if member is None or member.suspicion is None:
            return
        if refused is False:
            self._note_listening(member, Suspect(node, member.epoch, member.incarnation, node, listens=True))
            return
        if member.suspicion.stalled:
            member.suspicion.stalled = member.suspicion.listens = False
        if refused is None and node in self.linked and self.health.factor == 1 and not self.health.lag_s(now):
            # Not even its kernel answers one who is well and holds a link to it: an accuser who does not go by datagrams.
            self.declare(Suspect(node, member.epoch, member.incarnation, self.me), now)

    def on_knock(self, asker: Address, message: ConnectCheck, now: float) -> list[Effect]:
        """Tries to connect on somebody's behalf: to members only, at the address known here."""
        member = self.members.get(message.target)
        if member is None or message.target == self.me:
            return []
        number = self._errand(message.target, asker, message.seq, now)
        return [TryConnect(number, member.address)] if number is not None else []

    def on_knocked(self, message: ConnectChecked, now: float) -> None:
        by = message.sender.node
        for case in self.cases.values():
            if case.number == message.seq and by in case.relays and message.refused:
                case.refusals.add(by)
                self._judge(case, now)
                return

    def _judge(self, case: RefusalCase, now: float) -> None:
        """All who were asked and could have answered, up to two, must have been refused; and we ourselves."""
        needed = 0 if case.hearsay else min(REFUSALS_NEEDED, len(case.relays))
        member = self.members.get(case.node)
        if not case.refused_here or len(case.refusals) < needed or now - case.opened_at > CASE_S or member is None:
            return
        if member.live:
            self.refused_deaths += 1
            self.declare(Dead(case.node, case.epoch, case.incarnation, self.me, REFUSED), now)

    def _errand(self, node: NodeId, asker: Address | None, asker_seq: int, now: float) -> int | None:
        """A number for a connection to be tried; None when too many are."""
        if len(self._errands) >= MAX_ERRANDS:
            self._drop_old(now)
            if len(self._errands) >= MAX_ERRANDS:
                return None
        self._errand_number = (self._errand_number + 1) % 2**32
        self._errands[self._errand_number] = ConnectProbe(node, asker, asker_seq, now)
        return self._errand_number

    def _drop_old(self, now: float) -> None:
        """Cases and errands that prove nothing any more."""
        self._errands = {n: errand for n, errand in self._errands.items() if now - errand.started_at < CASE_S}
        self.cases = {n: case for n, case in self.cases.items() if now - case.opened_at < CASE_S}
