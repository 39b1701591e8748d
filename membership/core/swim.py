"""Failure detection and dissemination: SWIM as a state machine. Datagrams and time in, effects out.

One member is probed each period; a member that does not answer is probed through relays; if it answers none of them it is
suspected, and declared dead when its suspicion ends. An accused node refutes with a higher incarnation. A new claim is sent to a
few peers at once, then with other messages, a bounded number of times. The shared state is in `node_state.py`; how a claim
changes it, in `claims.py`, and about this node, in `refutation.py`; deaths that a refused port proves, in `refusal_detection.py`.
Source: SWIM (DSN 2002), section 4; Lifeguard (arXiv 1707.00788) for suspicion and the buddy on the ping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from membership.core.claims import ClaimProcessing
from membership.core.config import MembershipConfig
from membership.core.effects import LoadMeasured, MemberChanged, MembershipEffect, PingStream, SendDatagram, StartSync
from membership.core.health import LAG_MAX_S, missed_nacks
from membership.core.members import Member, Members
from membership.core.node_state import NodeState
from membership.core.probing import Probe, Probes
from membership.core.refusal_detection import RefusalDetection
from membership.core.refutation import Refutation
from membership.core.regions import ProbeSchedule, some_gossip_peers, some_relays
from membership.facts.fingerprint import Fingerprint
from mesh.ids import Address, NodeId
from mesh.keys.signing import Signer
from mesh.view import PeerState
from mesh.wire.gossip import (
    STALLED,
    Ack,
    Alive,
    Claim,
    ConnectCheck,
    ConnectChecked,
    Dead,
    Gossip,
    GossipMessage,
    Nack,
    Ping,
    PingReq,
    Sender,
    Suspect,
)

if TYPE_CHECKING:
    from random import Random

_MAX_SEEDS = 64
_NACK_SHARE = 0.8  # of the probe timeout, after which a relay sends a nack (Lifeguard, section IV-A)
_RELAYED_FACTOR = 1.25  # a relayed answer may take so much longer than expected
_REDIALLERS = 16  # nodes that redial each period, and one more for each dead member
_FAREWELLS = 32  # peers that get the Left claim directly; they spread it


@dataclass(frozen=True, slots=True)
class SwimStatistics:
    """Counts since the start; `rumours` and `suspects` are as of now."""

    probes_total: int
    probes_failed_total: int
    refutations_total: int
    conflicts_total: int
    sleeps_total: int
    unknown_claims_total: int
    refused_newcomers_total: int
    forged_claims_total: int
    rumours: int
    suspects: int
    refused_deaths_total: int
    health_score: int  # 0: healthy, 8: this node's observations of others are unreliable
    lag_s: float


class Swim:
    """The failure detector of one node."""

    def __init__(
        self,
        me: Alive,
        signer: Signer,
        config: MembershipConfig,
        rng: Random,
        now: float,
        fingerprint: Fingerprint,
        table: type[Members] = Members,
    ) -> None:
        state = self.state = NodeState(me, signer, config, rng, now, fingerprint, table)
        self.refutation = Refutation(state, me, now)
        self.claims = ClaimProcessing(state, self.refutation, self._on_newcomer)
        self.refusals = RefusalDetection(state, self.claims)
        self.me, self.members, self.myself = state.me, state.members, state.myself
        self._config, self._rng = config, rng
        self.probes = Probes(rng)  # those under way
        self._schedule = ProbeSchedule(rng)
        self._seeds: dict[Address, NodeId | None] = {}  # with the node that last answered there
        # A random phase: nodes started together do not probe in step.
        self._next_probe_at = now + config.probe_period_s * rng.random()
        self._next_redial_at = now + config.redial_period_s * (0.5 + rng.random())
        self._probed = self._failed = self._sleeps = 0

    def spread(self, now: float, without: tuple[NodeId, ...] = ()) -> list[MembershipEffect]:
        """Ends every call from outside: returns the changes, the new claims to a few peers, and the follow-ups of changes."""
        if not (self.state.is_pending or self.claims.doubted):
            return []  # as after nearly every datagram
        effects = self.state.flush(now, without)
        return effects + self.refusals.after_changes(effects, now)

    @property
    def deadline(self) -> float:
        """When `tick` next has something to do, in local monotonic seconds; infinite after `leave`."""
        if self.state.left:
            return math.inf
        at = self._next_probe_at  # read after every datagram: what is absent costs nothing
        if self.probes.under_way or self.probes.nacks_due:
            at = min(at, self.probes.deadline)
        if self.members.gone or self._seeds:  # else the links are checked when the next probe is due
            at = min(at, self._next_redial_at)
        if self.state.rumours.by_node:
            at = min(at, self.state.next_gossip_at)
        if self.members.suspects:
            at = min(at, *(m.suspicion.deadline for m in self.state.suspected() if m.suspicion))
        return at

    def remember_seed(self, address: Address) -> None:
        """Adds an address that is tried for as long as no live member has it."""
        if len(self._seeds) < _MAX_SEEDS:
            self._seeds.setdefault(address, None)

    def met_seed(self, address: Address, node: NodeId) -> None:
        """Records which node answered at a seed. A seed may be a host name, so the address alone does not identify the node."""
        if address in self._seeds:
            self._seeds[address] = node

    def receive(
        self, source: Address, message: GossipMessage, now: float, arrived_at: float | None = None
    ) -> list[MembershipEffect]:
        """Applies one datagram from `source`; `arrived_at`: when it reached this host, by the kernel's timestamp, if earlier."""
        sender = message.sender
        if self.state.left or sender.node == self.me:
            return []
        arrived_at = now if arrived_at is None else min(now, arrived_at)
        if arrived_at < now:
            self.state.health.lagged(now - arrived_at, now)  # this process was too slow to read it
        peer = self.members.get(sender.node)
        corrections = self._note_sender(peer, source, sender, now, arrived_at)
        if message.claims:
            corrections += self.claims.apply_all(source, message.claims, now)
            peer = self.members.get(sender.node)  # the claims may have added or removed the sender
        if peer is not None and peer.live:
            self.state.compare(sender.fingerprint, peer.address, now)  # after the claims: they may have removed the difference
        effects: list[MembershipEffect] = []
        rtt_s: float | None = None  # measured, if this is a direct ack
        match message:
            case Ping(seq=seq, target=target, where=where):
                # The ping is meant for another node that had this address: the sender gets this node's claim, and no ack.
                wanted = target == self.me
                claims = corrections if wanted else [self.myself.alive_claim(), *corrections]
                answer = self.state.distances.point_for_ack(where)
                bare = Ack(self.state.sender(now), seq, where=answer) if wanted else Gossip(self.state.sender(now))
                if peer is not None:
                    self.state.distances.store_point(peer, where)
                effects.append(self._send(source, bare, claims))
                corrections = []
            case Ack(seq=seq):
                rtt_s = self._on_ack(seq, sender.node, now, arrived_at, effects)
            case Nack(seq=seq):
                self.probes.nacked(seq, sender.node)
            case PingReq(seq=seq, target=target):
                effects += self._relay(source, seq, target, now)
            case ConnectCheck():
                effects += self.refusals.on_connect_check(source, message, now)
            case ConnectChecked():
                self.refusals.on_connect_checked(message, now)
            case Gossip():
                pass
        if corrections and (
            peer is None or peer.needs_corrections(corrections, now, self._config.exchange_gap_s)
        ):  # a sender that is no member: within its allowance
            effects.append(self._send(source, Gossip(self.state.sender(now)), corrections))
        if peer is not None and peer.live:
            if rtt_s is not None and isinstance(message, Ack):
                lagging = max(self.state.health.lag_s(now), peer.lag_s) > 0
                self.state.distances.measured(peer, rtt_s, message.where, lagging=lagging)
            effects.append(self._measure(peer, sender, now, rtt_s))
        return effects + self.spread(now, without=(sender.node,))

    def tick(self, now: float) -> list[MembershipEffect]:
        """Does all that is due at `now`, in a fixed order, and moves the deadline past it."""
        if self.state.left:
            return []
        # Suspicions do not show a suspended process: a confirmation may move the end of one into the past.
        due_at = min(self._next_probe_at, self.probes.deadline)
        if (late_s := now - due_at) > self._config.lag_tolerance_s:
            self._extend_deadlines(late_s, now)
            self.state.health.lagged(late_s, now)
        # Failed probes first: they open the suspicions that the rest of this tick spreads.
        effects: list[MembershipEffect] = []
        for probe in list(self.probes.under_way.values()):
            if now >= probe.ends_at:
                del self.probes.under_way[probe.seq]
                self._probe_failed(probe, now)
            elif now >= probe.indirect_at:
                effects += self._ask_others(probe, now)
        for relay in self.probes.take_nacks_due(now) if self.probes.nacks_due else ():
            effects.append(self._send(relay.asker, Nack(self.state.sender(now), relay.asker_seq), ()))
        for member in self.state.suspected():
            if member.suspicion is None or now >= member.suspicion.deadline:
                self._suspicion_ended(member, now)
        if now >= self._next_probe_at:
            self._next_probe_at = now + self._config.probe_period_s * self.state.health.factor
            if (target := self._schedule.next_target(self.members)) is not None:
                effects += self._probe(self.members[target], now)
        if now >= self.state.next_gossip_at and self.state.rumours.by_node:
            self.state.next_gossip_at = now + self._config.gossip_period_s
            for peer in some_gossip_peers(self.members, self._config.gossip_peers, self._rng):
                effects.append(self._send(self.members.address_of(peer), Gossip(self.state.sender(now)), ()))
        if now >= self._next_redial_at:
            self._next_redial_at = now + self._config.redial_period_s * (0.75 + 0.5 * self._rng.random())
            effects += self._redial(now)
            effects += self.refusals.watch(again=True) + self.refusals.look_again(now)
        return effects + self.spread(now)

    def _suspicion_ended(self, member: Member, now: float) -> None:
        """Declares a suspect dead whose suspicion ended; a suspect that listens is stalled instead, and gets more time."""
        suspicion = member.suspicion
        if suspicion is not None and suspicion.listens and not suspicion.stalled and suspicion.stall_patience_s > 0:
            suspicion.stalled, member.cause = True, STALLED
            self.state.note(MemberChanged(member.node, PeerState.SUSPECT, PeerState.SUSPECT, stalled=True))
        else:
            self.claims.declare(Dead(member.node, member.epoch, member.incarnation, self.me), now)

    def stream_answered(self, seq: int, by: NodeId, now: float) -> list[MembershipEffect]:
        """Applies the answer to a `PingStream`: the node lives, though datagrams to it or from it are lost."""
        probe = self.probes.under_way.get(seq)
        if not self.state.left and probe is not None and by == probe.target and self.probes.answered(seq, by) is not None:
            self._note_answered(probe, now)
        return self.spread(now)

    def lost(self, node: NodeId, now: float, *, proven: bool = False) -> list[MembershipEffect]:
        """Probes a node whose link broke, directly and through relays at once.

        `proven`: the link's handshake named `node`, and `link_made` reported it; its end may be the end of a process.
        """
        if proven and (left := self.state.linked.pop(node, 1) - 1) > 0:
            self.state.linked[node] = left
        member = self.members.get(node)
        if self.state.left or member is None or not member.live or node == self.me:
            return []
        effects = self.refusals.open_case(member, now) if proven else []
        if not any(p.target == node and p.indirect_at == math.inf for p in self.probes.under_way.values()):
            effects += self._probe(member, now, urgent=True)  # else relays are asked already
        return effects + self.spread(now)

    def tried(self, number: int, refused: bool | None, now: float) -> list[MembershipEffect]:
        """Applies the outcome of a `TryConnect`."""
        return [] if self.state.left else self.refusals.tried(number, refused, now) + self.spread(now)

    def leave(self, now: float) -> list[MembershipEffect]:
        """Sends the Left claim to live peers; nothing is sent after that."""
        if self.state.left:
            return []
        me = self.myself
        farewell = self.state.verifier.farewell(self.me, me.epoch, me.incarnation)
        me.signature = farewell.signature
        self.claims.declare(farewell, now)
        sender = self.state.sender(now)
        peers = self.members.some_peers(_FAREWELLS, self._rng)
        self.state.left = True
        return [
            *self.state.take_changes(),
            *(SendDatagram(self.members.address_of(peer), Gossip(sender, (farewell,))) for peer in peers),
        ]

    def statistics(self, now: float) -> SwimStatistics:
        health = self.state.health
        return SwimStatistics(
            probes_total=self._probed,
            probes_failed_total=self._failed,
            refutations_total=self.refutation.refutations,
            conflicts_total=self.refutation.conflicts,
            sleeps_total=self._sleeps,
            unknown_claims_total=self.claims.unknown_claims,
            refused_newcomers_total=self.claims.refused_newcomers,
            forged_claims_total=self.state.verifier.forged,
            rumours=len(self.state.rumours),
            suspects=len(self.members.suspects),
            refused_deaths_total=self.refusals.refused_deaths,
            health_score=health.score,
            lag_s=health.lag_s(now),
        )

    def _on_newcomer(self, node: NodeId) -> None:
        self._schedule.joined(self.members[node], self.members)

    def _note_sender(self, member: Member | None, source: Address, sender: Sender, now: float, arrived_at: float) -> list[Claim]:
        """Records that the sender is alive; returns the claim about it that it must refute, if it is not recorded as alive."""
        if member is None or (sender.epoch, sender.incarnation) > (member.epoch, member.incarnation):
            self.state.request_exchange(source, now)
            return []
        if (sender.epoch, sender.incarnation) == (member.epoch, member.incarnation):
            member.last_message_at = max(member.last_message_at, arrived_at)
            member.lag_s = sender.lag_ms / 1000
        if member.state is PeerState.ALIVE:
            return []
        # Lifeguard's buddy system: a suspect receives its suspicion with the next message. A node that has lost its epoch
        # receives its own later claim: it accepts no other node's count, and refutes only above its own claim.
        behind = (sender.epoch, sender.incarnation) < member.description[:2]
        return [member.alive_claim() if behind else member.claim(self.me)]

    def _measure(self, peer: Member, sender: Sender, now: float, rtt_s: float | None) -> LoadMeasured:
        load_at = now - sender.load_age_ms / 1000
        if load_at >= peer.load_at or peer.load_at > now:
            peer.load, peer.load_at = sender.load, load_at
        return LoadMeasured(peer.node, peer.load, peer.load_at, rtt_s)

    def _send(self, to: Address, bare: GossipMessage, first: Sequence[Claim]) -> SendDatagram:
        return SendDatagram(to, self.state.filled(bare, first))

    def _probe(self, member: Member, now: float, *, urgent: bool = False) -> list[MembershipEffect]:
        self._probed += 1
        slack_s, factor = self.state.slack_s(member, now), self.state.health.factor
        round_s, timeout_s = (
            self._config.probe_round_s * factor + slack_s,
            self._config.probe_timeout_s * factor + slack_s,
        )
        ends_at = now + (2 * timeout_s if urgent else round_s)
        probe = self.probes.start(member.node, now, now if urgent else now + timeout_s, ends_at)
        first = [member.claim(self.me)] if member.state is PeerState.SUSPECT else []
        ping = Ping(self.state.sender(now), probe.seq, member.node, where=self.state.distances.point_for_ping())
        effects: list[MembershipEffect] = [self._send(member.address, ping, first)]
        return effects + self._ask_others(probe, now) if urgent else effects

    def _ask_others(self, probe: Probe, now: float) -> list[MembershipEffect]:
        probe.indirect_at = math.inf
        relays = some_relays(self.members, self._config.indirect_peers, self._rng, probe.target)
        probe.relays |= frozenset(relays)
        probe.ends_at = max(probe.ends_at, now + self._relay_s(relays, probe.target))
        asked: list[MembershipEffect] = [
            self._send(self.members.address_of(relay), PingReq(self.state.sender(now), probe.seq, probe.target), ())
            for relay in relays
        ]
        return [*asked, PingStream(probe.seq, self.members[probe.target].address)] if probe.target in self.members else asked

    def _relay_s(self, relays: list[NodeId], target: NodeId) -> float:
        """How long an answer through relays, or their nack, may take: the detour over this node bounds it."""
        way_s = max((self.state.distances.expected_s(self.members[relay]) for relay in relays), default=0.0)
        there_s = self.state.distances.expected_s(self.members[target]) if target in self.members else 0.0
        nack_s = way_s + _NACK_SHARE * self._config.probe_timeout_s
        return min(LAG_MAX_S, _RELAYED_FACTOR * max(2 * way_s + there_s, nack_s))

    def _relay(self, asker: Address, asker_seq: int, target: NodeId, now: float) -> list[MembershipEffect]:
        # Only to members, at the stored address: no sender can make this node ping an arbitrary address.
        member = self.members.get(target)
        if member is None or target == self.me:
            return []
        nack_at = now + _NACK_SHARE * self._config.probe_timeout_s
        expires_at = now + self._config.probe_round_s + LAG_MAX_S
        seq = self.probes.relay(target, asker, asker_seq, now, nack_at, expires_at)
        if seq is None:
            return []
        first = [] if member.state is PeerState.ALIVE else [member.claim(self.me)]
        return [self._send(member.address, Ping(self.state.sender(now), seq, target), first)]

    def _on_ack(self, seq: int, by: NodeId, now: float, arrived_at: float, effects: list[MembershipEffect]) -> float | None:
        """Ends the probe or relays the ack; returns the round trip in s if the target answered directly and time has passed."""
        if (relay := self.probes.relayed(seq, by, now)) is not None:
            first = [self.members[by].claim(self.me)] if by in self.members else []
            effects.append(self._send(relay.asker, Ack(self.state.sender(now), relay.asker_seq), first))
            return None
        probe = self.probes.answered(seq, by)
        if probe is None:
            return None
        self._note_answered(probe, arrived_at)
        rtt_s = arrived_at - probe.sent_at
        return rtt_s if by == probe.target and rtt_s > 0 else None

    def _note_answered(self, probe: Probe, at: float) -> None:
        self.state.health.note(-1)
        if (target := self.members.get(probe.target)) is not None:
            target.last_message_at = max(target.last_message_at, at)
        if (case := self.refusals.cases.get(probe.target)) is not None and probe.sent_at >= case.opened_at:
            self.refusals.close_case(probe.target)

    def _probe_failed(self, probe: Probe, now: float) -> None:
        member = self.members.get(probe.target)
        if member is None or not member.live or member.last_message_at > probe.sent_at:
            return
        self._failed += 1
        self.state.health.note(missed_nacks(len(probe.relays), len(probe.nacks)))
        self.claims.declare(Suspect(member.node, member.epoch, member.incarnation, self.me), now)

    def _extend_deadlines(self, late_s: float, now: float) -> None:
        """Extends all deadlines by the time for which this process was suspended (SIGSTOP, a starved machine)."""
        self._sleeps += 1
        self.probes.delay(late_s, now)
        for member in self.state.suspected():
            if member.suspicion is not None:
                # A suspicion that began after the suspension, from input that had waited, must not start in the future.
                member.suspicion.started_at = min(now, member.suspicion.started_at + late_s)

    def _absent_seeds(self) -> list[Address]:
        """Returns the seeds where no live member is known."""
        met = {address: node for address, node in self._seeds.items() if node is None or not self._lives(node)}
        taken = {m.address for m in self.members if m.live} if met else set()
        return sorted(address for address in met if address not in taken)

    def _lives(self, node: NodeId) -> bool:
        return (member := self.members.get(node)) is not None and member.live

    def _redial(self, now: float) -> list[MembershipEffect]:
        """Tries one address of a dead member or a seed, so that a mesh that was split merges again."""
        effects: list[MembershipEffect] = []
        gone = [self.members[node] for node in sorted(self.members.gone)]
        for member in gone:
            if member.node != self.me and now - member.since > self._config.forget_s:
                self.state.forget(member)
        dead = [member.node for member in gone if member.state is PeerState.DEAD and member.node in self.members]
        # In a large mesh a few nodes are enough: else ten thousand would try one dead host. A seed may be known here alone.
        if self._rng.random() * self.members.live_count > len(dead) + _REDIALLERS:
            dead = []
        seeds = self._absent_seeds()
        if not (choices := len(dead) + len(seeds)):
            return effects
        if (choice := self._rng.randrange(choices)) < len(dead):
            member = self.members[dead[choice]]
            ping = Ping(self.state.sender(now), self.probes.next_seq(), member.node)
            return [*effects, self._send(member.address, ping, [member.claim(self.me)])]
        return [*effects, StartSync(seeds[choice - len(dead)])]
