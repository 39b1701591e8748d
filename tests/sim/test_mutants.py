"""Bugs planted on purpose: the simulations above must see each of them, or they show nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from random import Random

import pytest

from membership.core import (
    allowance,
    claim_verifier,
    claims,
    coordinates,
    health,
    outlook,
    refusal_detection,
    regions,
    suspicion,
    swim,
)
from membership.core.effects import MembershipEffect, SendDatagram
from membership.core.members import Member, Members
from membership.facts.fingerprint import Fingerprint
from membership.simulation.checkers import all_see, converged, deaths_of, detection_s
from membership.simulation.network import Network
from mesh.view import PeerState
from mesh.wire import datagram_codec
from mesh.wire.gossip import REFUSED, Alive, Dead, Gossip, Ping, Suspect
from tests.membership.pieces import peer_id

Mutation = Callable[[pytest.MonkeyPatch], None]


def crash_is_known_soon(seed: int = 1) -> bool:
    network = Network(seed, loss=0.01)
    ids = network.grow(30)
    killed_at = network.now
    network.crash(ids[7])
    network.run(3)
    took = detection_s(network, ids[7], killed_at)
    return len(took) == 29 and took[-1] < 0.5


def broken_links_kill_nobody(seed: int = 1) -> bool:
    network = Network(seed, loss=0.01)
    ids = network.grow(12)
    for number in range(6):
        network.break_links(ids[number])
        network.run(1.0)
        if deaths_of(network, ids):
            return False
    return True


def firewall_kills_nobody(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(12)
    network.nodes[ids[3]].refuses_all = True
    network.break_links(ids[3])
    network.run(5)
    return not deaths_of(network, ids)


def block_of_ten_seconds_kills_nobody(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(10)
    network.pause(ids[4])
    network.run(10)
    network.resume(ids[4])
    network.run(5)
    return not deaths_of(network, ids) and converged(network)


def silent_death_is_found(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(10)
    network.kill(ids[4])
    network.run(8)
    return all_see(network, ids[4], PeerState.DEAD)


def rack_is_one_cut(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(9)
    for node in ids[6:]:
        network.kill(node)  # in silence: their deaths are told one by one
    network.run(14)
    received = [(by, cut.lost) for _, by, cut in network.cuts]
    return sorted(received) == [(by, tuple(ids[6:])) for by in sorted(ids[:6])]


def smaller_side_holds_still(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(9)
    network.run(3)
    network.cut(ids[:3], ids[3:])
    network.run(12)
    return [network.nodes[node].core.outlook.frozen for node in ids] == [True] * 3 + [False] * 6


def round_trips_are_told_without_asking(seed: int = 1) -> bool:
    """Two sites that have no names: an average over both would be right for nobody."""
    network = Network(seed, far_s=(0.040, 0.041))
    ids = [network.add() for _ in range(6)]
    for number, node in enumerate(ids):
        network.ways.place(node, f"site {number % 2}")
        network.nodes[node].core.remember_seed(network.nodes[ids[0]].address)
    network.run(40)
    for number, by in enumerate(ids):
        for other, node in enumerate(ids):
            peer = network.nodes[by].core.peer(node)
            told_s = peer.rtt_estimate_s if peer is not None else None
            if by != node and (told_s is None or (told_s > 0.04) != (number % 2 != other % 2)):
                return False
    return True


def nobody_speaks_for_another(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(5)
    forged = Alive(ids[4], 1, 7, "evil", "6.6.6.6", 6, "", b"forged", b"")
    it, liar = network.nodes[ids[0]], network.nodes[ids[1]]
    claimed = Gossip(liar.core.swim.state.sender(network.now), (forged,))
    network.carry_out(it, it.core.receive(liar.address, claimed, network.now))
    network.run(0.05)
    return all(member.address[0] != "6.6.6.6" for by in ids for member in network.nodes[by].core.swim.members)


def nobody_accuses_beyond_what_was_said(seed: int = 1) -> bool:
    """The accused was not heard to say that, so it has no louder word than its next."""
    network = Network(seed)
    ids = network.grow(5)
    it, liar = network.nodes[ids[0]], network.nodes[ids[1]]
    claimed = Gossip(liar.core.swim.state.sender(network.now), (Suspect(ids[4], 1, 2**40, ids[1]),))
    network.carry_out(it, it.core.receive(liar.address, claimed, network.now))
    network.run(1.0)
    return network.nodes[ids[4]].core.swim.myself.incarnation <= 1 and converged(network)


def strangers_draw_no_more_than_they_give(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(12, settle_s=0.05)
    ping = Ping(network.nodes[ids[1]].core.swim.state.sender(network.now), 1, ids[0])
    answers = network.nodes[ids[0]].core.receive(("6.6.6.6", 6), ping, network.now)
    sent = [
        datagram_codec.encoded_bytes(send.message)
        for send in answers
        if isinstance(send, SendDatagram) and send.to[0] == "6.6.6.6"
    ]
    return 0 < sum(sent) <= datagram_codec.encoded_bytes(ping)


def three_of_four_probes_stay_at_home() -> bool:
    """Of one who stands watch for a region, and of one who does not."""
    for me in range(2):
        members = Members(Member(peer_id(me), (1, 0, "", "", me, "r0"), 1, 0, PeerState.ALIVE, 0.0), Fingerprint())
        for number in range(36):
            if number != me:
                where = (1, 0, "", "", number, f"r{number % 12 // 6 + number % 3 % 2}")
                members.put(Member(peer_id(number), where, 1, 0, PeerState.ALIVE, 0.0))
        patrol = regions.ProbeSchedule(Random(1))
        probed = [members.peek(node) for _ in range(400) if (node := patrol.next_target(members)) is not None]
        abroad = sum(member is not None and member.region != "r0" for member in probed)
        if not 0 < abroad <= len(probed) // 4 + len(members.abroad):
            return False
    return True


def convicted_at_once(
    self: refusal_detection.RefusalDetection, member: Member, now: float, *, hearsay: bool = False
) -> list[MembershipEffect]:
    self._claims.declare(Dead(member.node, member.epoch, member.incarnation, self._state.me, REFUSED), now)
    return []


def told_at_once(self: outlook.LossBatching) -> float:
    return self._batch_since if self._batch else math.inf


def mutant(target: object, name: str, value: object) -> Mutation:
    return lambda patch: patch.setattr(target, name, value)


MUTANTS: list[tuple[str, Mutation, Callable[[], bool]]] = [
    (
        "links are not watched",
        mutant(refusal_detection.RefusalDetection, "watch", lambda self, again=False: []),
        crash_is_known_soon,
    ),
    ("refused deaths are heard like silent ones", mutant(claims, "REFUSED", "never"), crash_is_known_soon),
    (
        "an end of a link is proof enough",
        mutant(refusal_detection.RefusalDetection, "open_case", convicted_at_once),
        broken_links_kill_nobody,
    ),
    (
        "an answer does not close the case",
        mutant(refusal_detection.RefusalDetection, "close_case", lambda self, node: None),
        firewall_kills_nobody,
    ),
    (
        "nobody looks whether a suspect listens",
        mutant(refusal_detection.RefusalDetection, "_look", lambda self, member, now: []),
        block_of_ten_seconds_kills_nobody,
    ),
    (
        "stalled means dead",
        mutant(
            swim.Swim,
            "_suspicion_ended",
            lambda self, member, now: self.claims.declare(Dead(member.node, member.epoch, member.incarnation, self.me), now),
        ),
        block_of_ten_seconds_kills_nobody,
    ),
    ("each loss is a cut of its own", mutant(outlook.LossBatching, "_batch_at", property(told_at_once)), rack_is_one_cut),
    ("nothing freezes", mutant(outlook, "FREEZE_SHARE", 1.0), smaller_side_holds_still),
    ("all freeze", mutant(outlook, "FREEZE_SHARE", 0.0), smaller_side_holds_still),
    (
        "no round trip moves a point",
        mutant(coordinates.Position, "observe", lambda self, node, theirs, rtt_s: True),
        round_trips_are_told_without_asking,
    ),
    (
        "all words hold",
        mutant(claim_verifier.ClaimVerifier, "verifies", lambda self, claimed, key: True),
        nobody_speaks_for_another,
    ),
    (
        "accusations count as far as they are aimed",
        mutant(claims, "limited_to_own", lambda claim, *known: claim),
        nobody_accuses_beyond_what_was_said,
    ),
    (
        "answers to strangers are not counted",
        mutant(allowance.Allowance, "covered", lambda self, effects: effects),
        strangers_draw_no_more_than_they_give,
    ),
    ("all watch all regions", mutant(regions, "ABROAD_EVERY", 1), three_of_four_probes_stay_at_home),
    (
        "nobody looks abroad",
        mutant(regions.ProbeSchedule, "next_target", regions.ProbeSchedule._at_home),
        three_of_four_probes_stay_at_home,
    ),
    ("suspicions never end", mutant(suspicion.Suspicion, "deadline", property(lambda self: 1e9)), silent_death_is_found),
    ("a failed probe accuses nobody", mutant(swim.Swim, "_probe_failed", lambda self, probe, now: None), silent_death_is_found),
    ("a node trusts nothing it sees", mutant(health.LocalHealth, "factor", property(lambda self: 60)), silent_death_is_found),
]


@cache
def without_it(holds: Callable[[], bool]) -> bool:
    """What the true code does: once for all mutants that it is held against."""
    return holds()


@pytest.mark.parametrize(("name", "plant", "holds"), MUTANTS, ids=[name for name, _, _ in MUTANTS])
def test_a_planted_bug_is_caught(name: str, plant: Mutation, holds: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_it(holds)
    plant(monkeypatch)
    assert not holds(), name
