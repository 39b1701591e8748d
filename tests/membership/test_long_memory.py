"""What is told again and again, and who is not forgotten: the copies that count, and the addresses dialled for 72 hours."""

from __future__ import annotations

from membership.core.config import MembershipConfig
from membership.core.dissemination import transmit_limit
from membership.core.effects import MemberForgotten, SendDatagram
from mesh.view import PeerState
from mesh.wire.gossip import Ping, Suspect
from tests.membership.pieces import CONFIG, address_of, alive, gossip, messages, node_among, only, peer_id, run_to, state

HOUR_S = 3600.0


def test_eager_copies_do_not_count_towards_a_rumours_transmit_limit() -> None:
    core = node_among(6)
    accusation = Suspect(peer_id(2), 1, 0, peer_id(1))
    eager = only(SendDatagram, core.receive(address_of(1), gossip(1, accusation), 0.0))
    told_at_once = [send for send in eager if accusation in send.message.claims]
    assert len(told_at_once) == CONFIG.eager_peers
    later = only(SendDatagram, run_to(core, 1.5))
    told_later = sum(any(claim.node == peer_id(2) and isinstance(claim, Suspect) for claim in s.message.claims) for s in later)
    assert told_later >= transmit_limit(CONFIG.transmit_multiplier, 7)


def test_where_somebody_was_is_dialled_for_72_hours_and_then_forgotten() -> None:
    """With periods that let three days pass in a moment; how long the dead are remembered is the default."""
    core = node_among(2, config=MembershipConfig(probe_period_s=60.0, redial_period_s=600.0))
    run_to(core, 2 * HOUR_S)
    assert state(core, 1) is state(core, 2) is PeerState.DEAD
    died_at = min(core.swim.members[peer_id(number)].since for number in (1, 2))
    assert died_at < HOUR_S
    run_to(core, died_at + 71 * HOUR_S)
    dialled = messages(run_to(core, died_at + 72 * HOUR_S), Ping)
    assert {to for to, _ in dialled} == {address_of(1), address_of(2)}
    to, ping = next((to, ping) for to, ping in dialled if to == address_of(2))
    assert ping.claims[0] == core.swim.members[peer_id(2)].claim(core.me), "it hears that it is dead, and can refute that"
    core.receive(to, gossip(2, alive(2, incarnation=1), incarnation=1), died_at + 72 * HOUR_S)
    assert state(core, 2) is PeerState.ALIVE
    assert only(MemberForgotten, run_to(core, died_at + 73 * HOUR_S, answers=True)) == [MemberForgotten(peer_id(1))]
