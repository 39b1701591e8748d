"""A slow node raises its health score and reports its lag; its peers lengthen their time-outs."""

from __future__ import annotations

import pytest

from membership.core.effects import PingStream
from membership.core.health import LAG_MAX_S, MAX_SCORE, LocalHealth, missed_nacks
from mesh.view import PeerState
from mesh.wire.gossip import Ack, Gossip, Nack, Ping, PingReq, Sender
from tests.membership.pieces import ME, address_of, gossip, messages, node_among, only, peer_id, run_to, sender, state


def test_the_score_stays_within_its_bounds_and_stretches_probes() -> None:
    health = LocalHealth()
    health.note(-1)
    assert health.factor == 1
    health.note(+100)
    assert (health.score, health.factor) == (MAX_SCORE, MAX_SCORE + 1)


def test_lag_is_the_worst_of_late_fades_and_is_bounded() -> None:
    health = LocalHealth()
    health.lagged(0.001, 1.0)
    assert health.lag_s(1.0) == 0.0, "what any scheduler does is no lag"
    health.lagged(2.0, 1.0)
    health.lagged(0.5, 1.1)
    assert health.lag_s(1.1) > 1.9
    assert health.lag_s(6.0) == pytest.approx(1.0)
    assert health.lag_s(100.0) == 0.0
    health.lagged(1e9, 100.0)
    assert health.lag_s(100.0) == LAG_MAX_S


@pytest.mark.parametrize(("asked", "nacks", "expected"), [(0, 0, 1), (3, 3, 0), (3, 1, 2), (3, 0, 3)])
def test_each_missing_nack_of_a_failed_probe_raises_the_health_score(asked: int, nacks: int, expected: int) -> None:
    assert missed_nacks(asked, nacks) == expected


def test_a_node_without_answers_slows_down_unless_its_relays_answer() -> None:
    deaf, hearing = node_among(8), node_among(8)
    run_to(deaf, 3.0)
    while hearing.deadline <= 3.0:
        now = hearing.deadline
        for to, request in messages(hearing.tick(now), PingReq):
            relay = to[1] - 7000
            hearing.receive(to, Nack(sender(relay), request.seq), now + 0.1)
    assert deaf.swim.state.health.score > 2
    assert hearing.swim.state.health.score == 0


def test_a_relay_sends_a_nack_only_while_the_target_has_not_answered() -> None:
    core = node_among(6)
    [(_, ping)] = messages(core.receive(address_of(1), PingReq(sender(1), 77, peer_id(2)), 1.0), Ping)
    nacks = messages(run_to(core, 1.19), Nack)
    assert [(to, nack.seq) for to, nack in nacks] == [(address_of(1), 77)]
    [(to, ack)] = messages(core.receive(address_of(2), Ack(sender(2), ping.seq), 1.2), Ack)
    assert (to, ack.seq) == (address_of(1), 77), "a late answer is still passed on"
    quick = node_among(6)
    [(_, ping)] = messages(quick.receive(address_of(1), PingReq(sender(1), 77, peer_id(2)), 1.0), Ping)
    quick.receive(address_of(2), Ack(sender(2), ping.seq), 1.01)
    assert messages(run_to(quick, 1.19), Nack) == []


def test_a_member_that_admits_a_lag_gets_so_much_longer() -> None:
    def suspected_at(lag_ms: int) -> float:
        core = node_among(1)
        core.receive(address_of(1), Gossip(Sender(peer_id(1), 1, 0, 0, lag_ms=lag_ms)), 0.0)
        while state(core, 1) is PeerState.ALIVE:
            core.tick(core.deadline)
        return core.swim.members[peer_id(1)].since

    assert suspected_at(2000) - suspected_at(0) == pytest.approx(2.0, abs=0.6)
    assert suspected_at(10**9) < suspected_at(0) + LAG_MAX_S + 1, "a liar does not live for ever"


def test_time_in_the_socket_is_reported_as_lag() -> None:
    core = node_among(3)
    core.receive(address_of(1), gossip(1), 5.0, 3.5)
    received = [message.sender.lag_ms for _, message in messages(core.receive(address_of(2), Ping(sender(2), 1, ME), 5.0), Ack)]
    assert received == [1500]


def test_an_answer_over_a_link_counts_where_datagrams_get_lost() -> None:
    core = node_among(4)
    while not (asked := only(PingStream, core.tick(core.deadline))):
        pass
    target = asked[0].to[1] - 7000
    now = core.deadline
    core.stream_answered(asked[0].seq, peer_id(target), now)
    run_to(core, now + 0.45)
    assert state(core, target) is PeerState.ALIVE
    other = node_among(4)
    while not (asked := only(PingStream, other.tick(other.deadline))):
        pass
    stranger = peer_id(1 + asked[0].to[1] % 4)
    other.stream_answered(asked[0].seq, stranger, other.deadline)
    run_to(other, other.deadline + 3.0)
    assert state(other, asked[0].to[1] - 7000) is not PeerState.ALIVE, "somebody else answered there"
