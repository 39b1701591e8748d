"""Refusal detection: a member whose link ended and whose host refuses connections to its port is dead at once.

A killed process takes its sockets with it: within milliseconds its links end and new connections are refused, while silence
takes a failure detector seconds to confirm. Rules against false deaths: a case is opened only by the end of a link whose
handshake named the peer; this node must be refused itself, and two relays as well (fewer only where the mesh has fewer), since
a firewall may refuse connections from one host alone; the verdict names the incarnation on which the case was opened, so a live
member refutes it, and a restarted one has a higher epoch. A host that is gone refuses nothing: that is left to probing.
A report of such a death is accepted at once, except by members with a link to the dead member: they check themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from membership.core.claims import ClaimProcessing
from membership.core.effects import MemberChanged, MembershipEffect, SendDatagram, TryConnect, WatchLinks
from membership.core.members import Member
from membership.core.node_state import NodeState
from membership.core.roster import MemberIds
from mesh.ids import Address, NodeId
from mesh.view import PeerState
from mesh.wire.gossip import REFUSED, ConnectCheck, ConnectChecked, Dead, Suspect

RELAYS_ASKED = 3
REFUSALS_NEEDED = 2  # of the relays asked
CASE_S = 2.0  # evidence older than this proves nothing together
MAX_CONNECT_PROBES = 256  # connections tried at once, for this node and for others


@dataclass(slots=True)
class RefusalCase:
    """The evidence for the death of one member."""

    number: int  # of the connect probe of this node, and of the connect checks that it sends to relays
    node: NodeId
    epoch: int
    incarnation: int
    opened_at: float
    hearsay: bool  # another member reported the death: a refusal of this node alone is enough
    refused_here: bool = False
    relays: set[NodeId] = field(default_factory=set)
    refusals: set[NodeId] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ConnectProbe:
    """A connection that is being tried: for this node's own case on `node`, or for the asker."""

    node: NodeId
    asker: Address | None
    asker_seq: int
    started_at: float


class RefusalDetection:
    """Watches ring neighbours over links, and decides whether the end of a link is a death."""

    def __init__(self, state: NodeState, claims: ClaimProcessing) -> None:
        self._state = state
        self._claims = claims
        self.watched: tuple[tuple[NodeId, Address], ...] = ()
        self._ring: MemberIds | None = None  # from which `watched` was taken
        self.cases: dict[NodeId, RefusalCase] = {}
        self._probes: dict[int, ConnectProbe] = {}
        self._probe_number = 0
        self.refused_deaths = 0

    @property
    def connect_probes(self) -> int:
        """The number of connect probes under way, for this node and for others."""
        return len(self._probes)

    def after_changes(self, effects: list[MembershipEffect], now: float) -> list[MembershipEffect]:
        """Returns the follow-ups of changes: checks of reported deaths and of new suspects, and the links to keep."""
        more = self._check_reported_deaths(now) if self._claims.doubted else []
        changed = [effect for effect in effects if isinstance(effect, MemberChanged)]
        for change in changed:
            if change.after is PeerState.SUSPECT and change.before is not PeerState.SUSPECT:
                member = self._state.members.get(change.node)
                more += self._look(member, now) if member is not None and self._watches(member, now) else []
        return more + self.watch() if changed else more

    def look_again(self, now: float) -> list[MembershipEffect]:
        """Checks stalled suspects: a suspect that no longer listens gets no more time."""
        self._drop_old(now)
        stalled = [m for m in self._state.suspected() if m.suspicion and m.suspicion.stalled and self._watches(m, now)]
        return [effect for member in stalled for effect in self._look(member, now)]

    def ring_successors(self, count: int) -> list[NodeId]:
        """Returns the live members that follow this node in the order of ids. Ids are random, so few share a rack."""
        return self._state.members.roster.after(self._state.me, count)

    def watch(self, *, again: bool = False) -> list[MembershipEffect]:
        """Asks the shell to keep links to the ring successors; `again`: also to those requested before."""
        state = self._state
        if again and state.members.roster is self._ring and all([node in state.linked for node, _ in self.watched]):
            return []  # a change of any member would have brought us here without `again`
        self._ring = state.members.roster
        watched = tuple((node, state.members.address_of(node)) for node in self.ring_successors(state.config.watched_peers))
        if watched == self.watched and not (again and any(node not in state.linked for node, _ in watched)):
            return []
        self.watched = watched
        return [WatchLinks(tuple(address for _, address in watched))]

    def link_made(self, node: NodeId) -> None:
        """Counts a link with `node` that is open, its handshake done."""
        self._state.linked[node] = self._state.linked.get(node, 0) + 1

    def open_case(self, member: Member, now: float, *, hearsay: bool = False) -> list[MembershipEffect]:
        """Tries to connect after a link ended or another member reported a death (`hearsay`)."""
        if (case := self._open_case(member, now)) is not None:
            case.hearsay |= hearsay
            self._judge(case, now)
            return []
        number = self._start_probe(member.node, None, 0, now)
        if number is None:
            return []
        self.cases[member.node] = RefusalCase(number, member.node, member.epoch, member.incarnation, now, hearsay)
        return [TryConnect(number, member.address)]

    def close_case(self, node: NodeId) -> None:
        """Closes the case of a node that answered a message sent after the case was opened."""
        self.cases.pop(node, None)

    def tried(self, number: int, refused: bool | None, now: float) -> list[MembershipEffect]:
        """Applies the outcome of a `TryConnect`: refused (True), connected (False), or no answer (None)."""
        state = self._state
        probe = self._probes.pop(number, None)
        if probe is None:
            return []
        if probe.asker is not None:
            checked = ConnectChecked(state.sender(now), probe.asker_seq, refused is True)
            return [SendDatagram(probe.asker, state.filled(checked, ()))]
        self._note_outcome(probe.node, refused, now)
        case = self.cases.get(probe.node)
        if case is None or case.number != number:
            return []
        if refused is not True:
            del self.cases[probe.node]
            return []
        # This node was refused: relays have to confirm it, unless another member already reported the death.
        case.refused_here = True
        relays = [] if case.hearsay else state.members.some_peers(RELAYS_ASKED, state.rng, without=(probe.node,))
        assert probe.node not in relays, "the accused is no relay in its own case"
        case.relays = set(relays)
        self._judge(case, now)
        check = ConnectCheck(state.sender(now), number, probe.node)
        return [SendDatagram(state.members.address_of(relay), state.filled(check, ())) for relay in relays]

    def on_connect_check(self, asker: Address, message: ConnectCheck, now: float) -> list[MembershipEffect]:
        """Tries to connect for another member: to members only, at the address known here."""
        member = self._state.members.get(message.target)
        if member is None or message.target == self._state.me:
            return []
        number = self._start_probe(message.target, asker, message.seq, now)
        return [TryConnect(number, member.address)] if number is not None else []

    def on_connect_checked(self, message: ConnectChecked, now: float) -> None:
        by = message.sender.node
        for case in self.cases.values():
            if case.number == message.seq and by in case.relays and message.refused:
                case.refusals.add(by)
                assert case.refusals <= case.relays, "only relays that were asked count"
                self._judge(case, now)
                return

    def _watches(self, member: Member, now: float) -> bool:
        return member.node in self._state.linked and self._open_case(member, now) is None

    def _open_case(self, member: Member, now: float) -> RefusalCase | None:
        """Returns the case of the member's current epoch and incarnation that has not expired."""
        case = self.cases.get(member.node)
        fits = case is not None and now - case.opened_at < CASE_S and (case.epoch, case.incarnation) == member.standing[:2]
        return case if fits else None

    def _look(self, member: Member, now: float) -> list[MembershipEffect]:
        """Tries to connect to a suspect that has a link with this node, to see whether its process exists."""
        number = self._start_probe(member.node, None, 0, now)
        return [TryConnect(number, member.address)] if number is not None else []

    def _check_reported_deaths(self, now: float) -> list[MembershipEffect]:
        """Checks the deaths just reported of members that still have a link with this node."""
        nodes, self._claims.doubted = self._claims.doubted, []
        still_there = [m for node in nodes if (m := self._state.members.get(node)) is not None and m.live]
        return [effect for member in still_there for effect in self.open_case(member, now, hearsay=True)]

    def _note_outcome(self, node: NodeId, refused: bool | None, now: float) -> None:
        """Applies the outcome of this node's own connect probe to a suspicion."""
        state = self._state
        member = state.members.get(node)
        if member is None or member.suspicion is None:
            return
        if refused is False:
            self._claims.note_listening(member, Suspect(node, member.epoch, member.incarnation, node, listens=True))
            return
        if member.suspicion.stalled:
            member.suspicion.stalled = member.suspicion.listens = False
        if refused is None and node in state.linked and state.health.factor == 1 and not state.health.lag_s(now):
            # Its kernel does not answer either, while this node is healthy and has a link: evidence independent of datagrams.
            self._claims.declare(Suspect(node, member.epoch, member.incarnation, state.me), now)

    def _judge(self, case: RefusalCase, now: float) -> None:
        """Declares the death if this node and all relays that could answer, at most two, were refused."""
        needed = 0 if case.hearsay else min(REFUSALS_NEEDED, len(case.relays))
        member = self._state.members.get(case.node)
        if not case.refused_here or len(case.refusals) < needed or now - case.opened_at > CASE_S or member is None:
            return
        if member.live:
            self.refused_deaths += 1
            self._claims.declare(Dead(case.node, case.epoch, case.incarnation, self._state.me, REFUSED), now)

    def _start_probe(self, node: NodeId, asker: Address | None, asker_seq: int, now: float) -> int | None:
        """Registers a connection to be tried and returns its number; None while too many are under way."""
        if len(self._probes) >= MAX_CONNECT_PROBES:
            self._drop_old(now)
            if len(self._probes) >= MAX_CONNECT_PROBES:
                return None
        self._probe_number = (self._probe_number + 1) % 2**32
        self._probes[self._probe_number] = ConnectProbe(node, asker, asker_seq, now)
        return self._probe_number

    def _drop_old(self, now: float) -> None:
        """Drops cases and connect probes that have expired."""
        self._probes = {number: probe for number, probe in self._probes.items() if now - probe.started_at < CASE_S}
        self.cases = {node: case for node, case in self.cases.items() if now - case.opened_at < CASE_S}
