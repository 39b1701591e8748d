"""Claims form an order, members a semilattice: whatever the order and number of copies, the same is known."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from membership.core.core import MembershipCore
from membership.core.effects import SendDatagram
from membership.core.members import SEVERITY, standing_of
from membership.facts.fingerprint import Fingerprint
from mesh.ids import NodeId
from mesh.view import PeerState
from mesh.wire.datagram_codec import encoded_bytes
from mesh.wire.gossip import MAX_MESSAGE_BYTES, Ack, Alive, Claim, Dead, Gossip, GossipMessage, Left, Ping, PingReq, Suspect
from tests.membership.pieces import CONFIG, ME, address_of, alive, core_of, exchange, left, node_among, peer_id, sender, signed

subjects = st.integers(1, 3).map(peer_id)
epochs = st.integers(1, 3)
incarnations = st.integers(0, 3)


def _alive(node: NodeId, epoch: int, incarnation: int) -> Alive:
    # One owner says one thing at one standing: name and port follow from it.
    return signed(Alive(node, epoch, incarnation, f"name-{epoch}-{incarnation}", "10.0.0.1", 100 * epoch + incarnation))


alives = st.builds(_alive, subjects, epochs, incarnations)
claims: st.SearchStrategy[Claim] = st.one_of(
    alives,
    st.builds(Suspect, subjects, epochs, incarnations, st.integers(0, 5).map(peer_id)),
    st.builds(Dead, subjects, epochs, incarnations, st.integers(0, 5).map(peer_id)),
    st.builds(left, subjects, epochs, incarnations),
)


def known(core: MembershipCore) -> dict[NodeId, tuple[object, ...]]:
    """What must not depend on order. A death heard of may stand as a suspicion for a while: both count as accused."""
    verdicts = {PeerState.SUSPECT: "accused", PeerState.DEAD: "accused"}
    members = (core.swim.members[node] for node in map(peer_id, (1, 2, 3)))
    return {m.node: (m.epoch, m.incarnation, verdicts.get(m.state, m.state), m.name, m.address) for m in members}


def after(received: list[Claim], numbered: int = 0) -> MembershipCore:
    core = node_among(3, numbered=numbered)
    for claim in received:
        core.receive(address_of(9), Gossip(sender(9), (claim,)), 1.0)
    return core


@given(claims, claims, claims)
def test_precedence_orders_by_epoch_then_incarnation_then_severity(a: Claim, b: Claim, c: Claim) -> None:
    x, y, z = standing_of(a), standing_of(b), standing_of(c)
    assert (x <= y) or (y <= x)
    assert not (x <= y <= z) or x <= z
    if a.epoch > b.epoch or (a.epoch == b.epoch and a.incarnation > b.incarnation):
        assert x > y


@given(st.lists(claims, max_size=12), st.randoms(use_true_random=False), st.data())
def test_order_and_repetition_of_claims_make_no_difference_once_notes_are_compared(
    received: list[Claim], rng: Random, data: st.DataObject
) -> None:
    """An accusation that came before the words it accuses counts against older ones: the exchange sets that right."""
    repeated = st.lists(st.sampled_from(received), max_size=5) if received else st.just([])
    shuffled = received + data.draw(repeated)
    rng.shuffle(shuffled)
    one, other = after(received), after(shuffled, numbered=8)
    exchange(one, other, 1.0)
    assert known(one) == known(other)


@given(st.lists(claims, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_accusations_makes_no_difference_once_claims_are_known(received: list[Claim], rng: Random) -> None:
    words = [claim for claim in received if isinstance(claim, Alive)]
    shuffled = list(received)
    rng.shuffle(shuffled)
    assert known(after(words + received)) == known(after(words + shuffled))


@given(st.lists(claims, max_size=12))
def test_what_is_known_of_a_node_never_goes_back(received: list[Claim]) -> None:
    core = node_among(3)
    standings = {m.node: m.standing for m in core.swim.members}
    for claim in received:
        core.receive(address_of(9), Gossip(sender(9), (claim,)), 1.0)
        for member in core.swim.members:
            assert member.standing >= standings.get(member.node, member.standing)
            standings[member.node] = member.standing


@given(st.lists(claims, max_size=12))
def test_only_the_owner_raises_an_incarnation(received: list[Claim]) -> None:
    core = after(received)
    for member in core.swim.members:
        claimed = [(c.epoch, c.incarnation) for c in received if c.node == member.node and isinstance(c, Alive | Left)] + [(1, 0)]
        assert (member.epoch, member.incarnation) == max(claimed)


@given(st.lists(claims, max_size=12))
def test_the_dead_and_departed_rise_only_by_a_higher_incarnation_or_epoch(received: list[Claim]) -> None:
    core = node_among(3)
    for number in (1, 2, 3):
        core.swim.claims.declare(Dead(peer_id(number), 1, 0, ME), 0.0)
    for claim in received:
        gone = {m.node: (m.epoch, m.incarnation) for m in core.swim.members if not m.live}
        core.receive(address_of(9), Gossip(sender(9), (claim,)), 1.0)
        for node, before in gone.items():
            member = core.swim.members[node]
            assert not member.live or (member.epoch, member.incarnation) > before


@given(st.lists(claims, max_size=20), st.lists(st.integers(0, 2**16), min_size=1, max_size=20))
def test_the_fingerprint_kept_up_by_steps_equals_the_one_made_anew(received: list[Claim], versions: list[int]) -> None:
    core = after(received)
    for number, version in enumerate(versions):
        core.swim.members.fingerprint.facts(peer_id(number % 5), 1 + version % 3, version)
    anew = Fingerprint()
    for member in core.swim.members:
        if member.live:
            anew.live(member.node, member.epoch, member.incarnation)
    for number, version in enumerate(versions):
        anew.facts(peer_id(number % 5), 1 + version % 3, version)
    assert core.fingerprint == anew.value


numbers = st.integers(0, 6)
seqs = st.integers(0, 2**32)
bundles = st.lists(claims | st.builds(Dead, st.just(ME), epochs, incarnations, subjects), max_size=5).map(tuple)
inputs: st.SearchStrategy[GossipMessage | float | NodeId] = st.one_of(
    st.builds(Ping, numbers.map(sender), seqs, numbers.map(peer_id), bundles),
    st.builds(Ack, numbers.map(sender), seqs, bundles),
    st.builds(PingReq, numbers.map(sender), seqs, numbers.map(peer_id), bundles),
    st.builds(Gossip, numbers.map(sender), bundles),
    st.floats(0.0, 5.0),
    subjects,
)


@settings(max_examples=100)
@given(st.lists(inputs, max_size=30))
def test_after_any_input_a_tick_uses_its_deadline_up_and_bounds_hold(steps: list[GossipMessage | float | NodeId]) -> None:
    core = node_among(3)
    now = 0.0
    for step in steps:
        if isinstance(step, float):
            now += step
            effects = core.tick(now)
            assert core.deadline > now
        elif isinstance(step, str):
            effects = core.lost(NodeId(step), now)
        else:
            effects = core.receive(address_of(int(step.sender.node, 16)), step, now)
        for effect in effects:
            if isinstance(effect, SendDatagram):
                assert encoded_bytes(effect.message) <= MAX_MESSAGE_BYTES
        assert len(core.swim.state.rumours) <= len(core.swim.members)
        assert core.swim.members.suspects == {m.node for m in core.swim.members if m.state is PeerState.SUSPECT}
        assert core.swim.myself.state is PeerState.ALIVE
        assert all((m.suspicion is not None) == (m.state is PeerState.SUSPECT) for m in core.swim.members)


def test_severity_ranks_every_state() -> None:
    assert sorted(PeerState, key=SEVERITY.__getitem__) == [PeerState.ALIVE, PeerState.SUSPECT, PeerState.DEAD, PeerState.LEFT]
    assert core_of(alive(0), CONFIG, Random(1)).deadline > 0.0
