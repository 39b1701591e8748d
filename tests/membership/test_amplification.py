"""No unproven address is ever sent more bytes than came from it, whatever is received from there."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from membership.core.allowance import KEPT_S, MAX_ACCOUNTS
from membership.core.core import MembershipCore
from membership.core.effects import MembershipEffect, SendDatagram, TryConnect
from mesh.ids import Address, NodeId
from mesh.view import PeerState
from mesh.wire.datagram_codec import encoded_bytes
from mesh.wire.gossip import Ack, Claim, ConnectCheck, Dead, Gossip, GossipMessage, Nack, Ping, PingReq, Suspect
from tests.membership.pieces import ME, address_of, alive, gossip, messages, node_among, only, peer_id, sender, state

STRANGERS: list[Address] = [("6.6.6.6", 6000 + n) for n in range(3)]
numbers = st.integers(0, 9)  # 1 to 6 are members, 0 is the node itself
claims: st.SearchStrategy[Claim] = st.one_of(
    st.builds(alive, st.integers(1, 9), st.integers(0, 2)),
    st.builds(Suspect, numbers.map(peer_id), st.just(1), st.integers(0, 2), numbers.map(peer_id)),
    st.builds(Dead, numbers.map(peer_id), st.just(1), st.integers(0, 2), numbers.map(peer_id)),
)
bundles = st.lists(claims, max_size=4).map(tuple)
seqs = st.integers(0, 5)
claimed: st.SearchStrategy[GossipMessage] = st.one_of(
    st.builds(Ping, numbers.map(sender), seqs, numbers.map(peer_id), bundles),
    st.builds(PingReq, numbers.map(sender), seqs, numbers.map(peer_id), bundles),
    st.builds(ConnectCheck, numbers.map(sender), seqs, numbers.map(peer_id), bundles),
    st.builds(Ack, numbers.map(sender), seqs, bundles),
    st.builds(Nack, numbers.map(sender), seqs, bundles),
    st.builds(Gossip, numbers.map(sender), bundles),
)
steps = st.one_of(
    st.tuples(st.sampled_from(STRANGERS), claimed),  # a datagram from there
    st.floats(0.01, 3.0),  # time passes
    st.just("answer"),  # whoever was asked on somebody's behalf answers
)


def full_of_news() -> MembershipCore:
    """A node among six that has a datagram's worth to tell."""
    core = node_among(6)
    for number in range(20, 29):
        core.receive(address_of(1), gossip(1, alive(number)), 0.0)
    return core


def answers(core: MembershipCore, effects: list[MembershipEffect], now: float) -> list[MembershipEffect]:
    """What follows from the answers to all that was asked on the strangers' behalf."""
    more: list[MembershipEffect] = []
    for _, ping in messages(effects, Ping):
        member = core.swim.members[ping.target]
        more += core.receive(member.address, Ack(sender(int(ping.target, 16)), ping.seq), now)
    for errand in only(TryConnect, effects):
        more += core.tried(errand.number, True, now)
    return more


@settings(max_examples=50)
@given(st.lists(steps, max_size=25))
def test_never_more_bytes_go_to_an_unproven_address_than_came_from_it(
    taken: list[tuple[Address, GossipMessage] | float | str],
) -> None:
    core, now = full_of_news(), 1.0
    came: Counter[Address] = Counter()
    went: Counter[Address] = Counter()
    asked: list[MembershipEffect] = []
    for step in taken:
        if isinstance(step, tuple):
            source, message = step
            came[source] += encoded_bytes(message)
            effects = core.receive(source, message, now)
        elif isinstance(step, float):
            now += step
            effects = core.tick(now)
        else:
            effects, asked = answers(core, asked, now), []
        asked += effects
        for effect in effects:
            if isinstance(effect, SendDatagram):
                went[effect.to] += encoded_bytes(effect.message)
        for stranger in STRANGERS:
            assert went[stranger] <= came[stranger], f"{went[stranger]} bytes for {came[stranger]}"


def test_a_member_gets_claims_and_an_unproven_address_only_its_ack() -> None:
    core = full_of_news()
    ping = Ping(sender(1), 5, ME)
    ((_, to_stranger),) = messages(core.receive(STRANGERS[0], ping, 1.0), Ack)
    assert to_stranger.claims == () and to_stranger.seq == 5
    ((_, to_member),) = messages(core.receive(address_of(1), ping, 1.0), Ack)
    assert len(to_member.claims) >= 8


def test_a_newcomer_that_is_not_known_here_yet_is_not_taken_for_silent() -> None:
    one, newcomer = full_of_news(), node_among(0, numbered=50)
    newcomer.receive(address_of(1), gossip(1, one.swim.myself.alive_claim()), 0.0)
    asked = newcomer.tick(newcomer.deadline)
    while not (pings := messages(asked, Ping)):
        asked = newcomer.tick(newcomer.deadline)
    ((_, ping),) = pings
    ((_, ack),) = messages(one.receive(address_of(50), ping, 1.0), Ack)
    now = newcomer.deadline
    newcomer.receive(one.swim.myself.address, ack, now)
    newcomer.tick(now + 1)
    assert newcomer.swim.members[NodeId(one.me)].state is PeerState.ALIVE


def test_a_sender_at_its_signed_address_is_no_longer_unproven() -> None:
    core = full_of_news()
    there = address_of(60)
    ((_, first),) = messages(core.receive(there, Ping(sender(60), 1, ME), 1.0), Ack)
    assert first.claims == ()
    core.receive(there, gossip(60, alive(60)), 1.0)
    assert state(core, 60) is PeerState.ALIVE
    ((_, second),) = messages(core.receive(there, Ping(sender(60), 2, ME), 1.0), Ack)
    assert len(second.claims) >= 8


def test_accounts_are_bounded_and_further_addresses_are_dropped_until_they_expire() -> None:
    core = node_among(6)
    for number in range(1, 7):
        core.receive(address_of(number), gossip(number), 0.0)
    for number in range(MAX_ACCOUNTS):
        assert core.receive(("6.6.6.6", 1 + number), Ping(sender(70), 1, ME), 1.0)
    further = ("7.7.7.7", 1)
    assert core.receive(further, Ping(sender(70), 1, ME, (alive(70),)), 1.0) == []
    assert core.allowance.dropped["strangers"] == 1 and state(core, 70) is None
    assert core.receive(address_of(1), Ping(sender(1), 1, ME), 1.0), "members are heard as ever"
    assert core.receive(further, Ping(sender(70), 1, ME), 1.0 + KEPT_S)
