"""Corrections to a node that is behind, and that they end."""

from __future__ import annotations

from random import Random

import pytest

from membership.core.core import MembershipCore
from membership.core.effects import MembershipEffect, SendDatagram
from membership.core.refutation import Refutation
from mesh.ids import Address
from mesh.view import PeerState
from mesh.wire.gossip import Ack, Gossip, GossipMessage, Ping
from tests.membership.pieces import (
    CONFIG,
    address_of,
    alive,
    core_of,
    gossip,
    messages,
    node_among,
    peer_id,
    run_to,
    sender,
    state,
)

WAY_S = 0.001


def datagrams_between(one: MembershipCore, other: MembershipCore, now: float, until: float) -> int:
    """How many these two send one another in that time, where no call gets through; what is due is done when it is due."""
    cores = {core.swim.myself.address: core for core in (one, other)}
    under_way: list[tuple[float, Address, Address, GossipMessage]] = []
    sent = 0

    def carry_out(source: Address, effects: list[MembershipEffect], now: float) -> None:
        under_way.extend(
            (now + WAY_S, source, effect.to, effect.message) for effect in effects if isinstance(effect, SendDatagram)
        )

    while now < until:
        at, address = min((core.deadline, address) for address, core in cores.items())
        if under_way and under_way[0][0] <= at:
            now, source, to, message = under_way.pop(0)
            sent += 1
            carry_out(to, cores[to].receive(source, message, now), now)
        else:
            now = max(now, at)
            carry_out(address, cores[address].tick(now), now)
    return sent


def test_corrections_to_a_node_that_lost_its_epoch_are_limited_in_rate() -> None:
    """It knows no words of its later run, and calls would bring them; each word of its earlier one earns the same answer."""
    lost, other = core_of(alive(1), CONFIG, Random(1)), core_of(alive(2), CONFIG, Random(2))
    lost.receive(address_of(2), gossip(2, alive(2)), 0.0)
    other.receive(address_of(1), gossip(1, alive(1, epoch=3)), 0.0)
    run_to(other, 30.0)
    assert state(other, 1) is PeerState.DEAD
    assert datagrams_between(lost, other, 30.0, 40.0) < 10 * 12


def test_two_nodes_that_ignore_accusations_do_not_correct_each_other_endlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As peers of another version may be: each takes the other for dead, hears so, and changes nothing."""
    monkeypatch.setattr(Refutation, "apply", lambda *_: [])
    one, other = core_of(alive(1), CONFIG, Random(1)), core_of(alive(2), CONFIG, Random(2))
    one.receive(address_of(2), gossip(2, alive(2)), 0.0)
    other.receive(address_of(1), gossip(1, alive(1)), 0.0)
    for core in (one, other):
        run_to(core, 30.0)
    assert (state(one, 2), state(other, 1)) == (PeerState.DEAD, PeerState.DEAD)
    assert datagrams_between(one, other, 30.0, 40.0) < 10 * 12


def test_a_node_that_lost_its_epoch_receives_its_own_later_claim() -> None:
    lost, other = core_of(alive(1), CONFIG, Random(1)), core_of(alive(2), CONFIG, Random(2))
    other.receive(address_of(1), gossip(1, alive(1, epoch=3)), 0.0)
    run_to(other, 30.0)
    [(_, answer)] = messages(other.receive(address_of(1), Ping(sender(1), 1, peer_id(2)), 30.0), Ack)
    assert answer.claims[0] == alive(1, epoch=3)
    lost.receive(address_of(2), answer, 30.0)
    assert (lost.swim.myself.epoch, lost.swim.myself.incarnation) == (4, 0)


def test_the_same_correction_goes_to_one_peer_once_a_while_and_another_at_once() -> None:
    core = node_among(3)
    core.receive(address_of(1), gossip(1, alive(2, incarnation=4), alive(3, incarnation=4)), 0.0)

    def received(by: int, about: int, now: float) -> int:
        effects = core.receive(address_of(by), gossip(by, alive(about)), now)
        return sum(alive(about, incarnation=4) in message.claims for to, message in messages(effects, Gossip))

    assert [received(1, 2, 1.0), received(1, 2, 1.1), received(3, 2, 1.2), received(1, 3, 1.3), received(1, 3, 1.9)] == [
        1,
        0,
        1,
        1,
        1,
    ]
