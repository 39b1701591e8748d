"""When notes are compared."""

from __future__ import annotations

from membership.core.config import MembershipConfig
from membership.core.effects import StartSync
from membership.core.exchanges import Exchanges
from mesh.wire.gossip import Gossip
from tests.membership.pieces import CONFIG, ME, address_of, alive, gossip, node_among, only, sender


def test_a_difference_is_looked_into_soon_in_a_small_mesh_and_later_in_a_large_one() -> None:
    exchanges = Exchanges(MembershipConfig(exchange_patience_s=0.01), 0.0)
    exchanges.note(7, 5.0)
    exchanges.note(7, 6.0)
    assert exchanges.settled(100, 6.0) and not exchanges.settled(101, 6.0), "it is what it has been since 5.0"
    exchanges.note(8, 6.0)
    assert not exchanges.settled(100, 6.9) and exchanges.settled(100, 7.0)


def test_a_difference_that_has_just_come_up_is_left_to_rumours_for_a_moment() -> None:
    core = node_among(9, config=MembershipConfig(exchange_patience_s=0.01))
    differs = Gossip(sender(1, fingerprint=1))
    assert only(StartSync, core.receive(address_of(1), differs, 1.0)) == [StartSync(address_of(1))]
    core.receive(address_of(2), gossip(2, alive(10)), 2.0)
    assert only(StartSync, core.receive(address_of(1), differs, 2.1)) == []
    assert only(StartSync, core.receive(address_of(1), differs, 2.12)) == [StartSync(address_of(1))]


def test_news_that_comes_along_is_taken_in_before_fingerprints_are_compared() -> None:
    """So the message that brings the difference itself asks for no exchange."""
    teller, listener = node_among(4, numbered=0), node_among(4, numbered=9)
    listener.receive(address_of(0), Gossip(teller.swim.state.sender(1.0), (teller.swim.myself.alive_claim(),)), 1.0)
    teller.receive(address_of(9), Gossip(listener.swim.state.sender(1.0), (listener.swim.myself.alive_claim(),)), 1.0)
    assert teller.fingerprint == listener.fingerprint
    teller.leave(2.0)
    [farewell] = [m.claim(ME) for m in teller.swim.members if m.node == teller.me]
    received = Gossip(teller.swim.state.sender(2.0), (farewell,))
    assert only(StartSync, listener.receive(address_of(0), received, 2.0)) == []
    assert only(StartSync, listener.receive(address_of(1), Gossip(sender(1, fingerprint=1)), 3.0)) == [StartSync(address_of(1))]


def test_one_peer_is_asked_only_so_often_and_so_are_all() -> None:
    exchanges = Exchanges(CONFIG, 0.0)
    assert exchanges.take(address_of(1), 1.0)
    assert not exchanges.take(address_of(2), 1.0 + CONFIG.exchange_pace_s / 2)
    assert exchanges.take(address_of(2), 1.0 + CONFIG.exchange_pace_s)
    assert not exchanges.take(address_of(1), 1.0 + CONFIG.exchange_gap_s / 2)
    assert exchanges.take(address_of(1), 1.0 + CONFIG.exchange_gap_s)
