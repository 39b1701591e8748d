"""Distances of members: when points are sent, what is measured and what is estimated."""

from __future__ import annotations

import math
from random import Random

import pytest

from membership.core.coordinates import Coordinate, pack
from membership.core.core import MembershipCore
from membership.core.distances import Distances
from membership.simulation.network import Network
from mesh.wire.gossip import Ack, Alive, Ping, PingReq
from mesh.wire.sync import Sync
from tests.membership.pieces import CONFIG, ME, address_of, alive, gossip, messages, node_among, peer_id, sender, signed

THERE = Coordinate((0.03, *[0.0] * 7), error=0.1)


def first_ping(core: MembershipCore) -> tuple[int, Ping, float]:
    """The number of the peer that is pinged first, the ping, and when."""
    while not (pings := messages(core.tick(now := core.deadline), Ping)):
        pass
    return int(pings[0][1].target, 16), pings[0][1], now


def answered(core: MembershipCore, rtt_s: float, where: bytes | None = None, lag_ms: int = 0) -> int:
    number, ping, sent_at = first_ping(core)
    by = sender(number).__class__(peer_id(number), 1, 0, 0, lag_ms=lag_ms)
    core.receive(address_of(number), Ack(by, ping.seq, where=where), sent_at + rtt_s)
    return number


@pytest.mark.parametrize(
    ("samples", "rtts_s", "told"),
    [(0, [0.06], 160), (7, [0.06], 160), (60, [0.06], 10), (8, [0.002], 10), (60, [0.01, 0.9], 160), (512, [0.01, 0.9], 40)],
)
def test_a_settled_node_sends_its_point_on_few_pings(samples: int, rtts_s: list[float], told: int) -> None:
    distances = Distances(Random(1))
    core = node_among(2)
    for number in range(samples):
        which = number % len(rtts_s)
        distances.measured(core.swim.members[peer_id(1 + which)], rtts_s[which], pack(Coordinate()), lagging=False)
    assert sum(distances.point_for_ping() is not None for _ in range(160)) == told


def test_an_ack_carries_a_point_exactly_when_the_ping_did() -> None:
    core = node_among(1)
    for where in (None, pack(THERE)):
        ((_, ack),) = messages(core.receive(address_of(1), Ping(sender(1), 1, ME, where=where), 1.0), Ack)
        assert (ack.where is None) is (where is None)
    assert core.swim.members[peer_id(1)].point is not None, "and the asker's own word is kept"


def test_the_sent_point_follows_the_nodes_own_point() -> None:
    distances, told = Distances(Random(1)), []
    for rtt_s in (0.06, 0.09, 0.03):
        distances.measured(node_among(1).swim.members[peer_id(1)], rtt_s, pack(THERE), lagging=False)
        told.append(distances.point_for_ack(b""))
        assert told[-1] == distances.point_for_ping() == pack(distances.position.point)
    assert len(set(told)) == 3


def test_round_trips_move_the_point_and_unprobed_peers_are_estimated() -> None:
    core = node_among(3)
    number = answered(core, 0.060, pack(THERE))
    measured = core.peer(peer_id(number))
    assert measured is not None and math.isclose(measured.rtt_s or 0, 0.060, abs_tol=1e-9)
    assert core.swim.state.distances.position.samples == 1
    other = next(n for n in (1, 2, 3) if n != number)
    peer = core.peer(peer_id(other))
    assert peer is not None and peer.rtt_s is None
    assert peer.rtt_estimate_s is not None and math.isclose(peer.rtt_estimate_s, 0.060, abs_tol=1e-9), "as its region is"
    core.receive(address_of(other), Ping(sender(other), 9, ME, where=pack(THERE)), 5.0)
    peer = core.peer(peer_id(other))
    assert peer is not None and peer.rtt_estimate_s == pytest.approx(
        core.swim.state.distances.position.point.distance_s(core.swim.members[peer_id(other)].point or Coordinate())
    )


def test_without_any_measurement_there_is_no_estimate_and_none_to_itself() -> None:
    core = node_among(1)
    stranger, itself = core.peer(peer_id(1)), core.peer(ME)
    assert stranger is not None and itself is not None
    assert (stranger.rtt_s, stranger.rtt_estimate_s, itself.rtt_estimate_s) == (None, None, None)


@pytest.mark.parametrize("raw", [b"", b"x" * 22, b"\xff" * 22, b"\x00" * 32])
def test_an_invalid_point_is_counted_and_the_ack_still_ends_the_probe(raw: bytes) -> None:
    core = node_among(1)
    number = answered(core, 0.01, raw)
    distances = core.swim.state.distances
    assert (distances.position.refused, distances.position.samples) == (1, 0)
    assert core.swim.members[peer_id(number)].last_message_at > 0


def test_an_answer_delayed_by_a_lagging_host_does_not_move_the_point() -> None:
    core = node_among(1)
    answered(core, 0.15, pack(THERE), lag_ms=100)
    assert core.swim.state.distances.position.samples == 0


def test_an_answer_through_a_relay_times_nothing_and_a_later_direct_one_does() -> None:
    """A peer first met through a relay is measured anew, again and again (mesh-llm #106)."""
    core = node_among(3, config=CONFIG)
    number, ping, sent_at = first_ping(core)
    asked = messages(core.tick(sent_at + CONFIG.probe_timeout_s), PingReq)
    relay = next(n for n in (1, 2, 3) if address_of(n) == asked[0][0])
    core.receive(address_of(relay), Ack(sender(relay), ping.seq, where=pack(THERE)), sent_at + 0.3)
    assert core.swim.members[peer_id(number)].rtt_s is None and core.swim.state.distances.position.samples == 0
    for _ in range(6):
        answered(core, 0.004)
    assert core.swim.members[peer_id(number)].rtt_s == pytest.approx(0.004)


@pytest.mark.parametrize(("rtt_s", "silent_s"), [(0.004, 0.0), (0.06, 0.0), (0.3, 0.7), (9.0, 5.0)])
def test_a_far_member_gets_as_much_more_time_as_its_way_is_longer(rtt_s: float, silent_s: float) -> None:
    core = node_among(3)
    member = core.swim.members[peer_id(answered(core, rtt_s))]
    assert core.swim.state.slack_s(member, 1e6) == pytest.approx(silent_s)


def test_an_ack_that_took_no_time_is_no_measurement() -> None:
    """Zero milliseconds come from a broken clock (mesh-llm #417)."""
    core = node_among(1)
    number = answered(core, 0.0, pack(THERE))
    assert core.swim.members[peer_id(number)].rtt_s is None and core.swim.state.distances.position.samples == 0


@pytest.mark.parametrize("moved", ["restarted", "another address"])
def test_what_was_measured_of_a_former_place_is_forgotten(moved: str) -> None:
    core = node_among(1)
    answered(core, 0.05, pack(THERE))
    assert core.swim.members[peer_id(1)].point is not None
    claim = alive(1, epoch=2) if moved == "restarted" else signed(Alive(peer_id(1), 1, 1, "n", "10.9.9.9", 1))
    core.receive(address_of(1), gossip(1, claim), 9.0)
    member = core.swim.members[peer_id(1)]
    assert (member.point, member.rtt_s) == (None, None)


def test_a_newcomer_learns_from_one_exchange_where_everybody_is() -> None:
    core, newcomer = node_among(2), node_among(0)
    core.receive(address_of(1), Ping(sender(1), 9, ME, where=pack(THERE)), 1.0)
    synced, _ = core.answer(peer_id(9), newcomer.ask(), 1.0)
    newcomer.learn(address_of(0), synced, 1.0)
    assert isinstance(newcomer.ask(), Sync)
    assert newcomer.swim.members[peer_id(1)].point == core.swim.members[peer_id(1)].point is not None
    assert newcomer.swim.members[peer_id(2)].point is None


@pytest.mark.parametrize("seed", range(2))
def test_in_a_mesh_estimates_come_near_the_truth(seed: int) -> None:
    network = Network(seed, delay_s=(0.005, 0.006))
    ids = network.grow(12)
    network.run(60)
    off = []
    for node in ids:
        for other in network.nodes[node].core.swim.members:
            estimate_s = network.nodes[node].core.swim.state.distances.estimate_s(other)
            if other.node != node:
                assert estimate_s is not None
                off.append(abs(estimate_s - 0.011) / 0.011)
    assert sum(off) / len(off) < 0.2, f"seed {seed}"
