"""A peer that holds the mesh key and forges claims: what it can claim about others, and what is rejected."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import EpochRenewed, StartSync
from mesh.ids import NodeId
from mesh.keys.signing import IdentityKey
from mesh.view import PeerState
from mesh.wire.gossip import REFUSED, Alive, Claim, Dead, Gossip, Left, Suspect
from mesh.wire.statements import alive_statement, left_statement
from mesh.wire.sync import MemberRecord, Sync
from tests.membership.pieces import (
    ME,
    address_of,
    alive,
    exchange,
    gossip,
    left,
    member_record,
    messages,
    node_among,
    only,
    peer_id,
    sender,
    state,
)

VICTIM = peer_id(1)
counters = st.integers(0, 5) | st.just(2**48 - 2)
scribbles = st.binary(max_size=8)
forged_words: st.SearchStrategy[Alive | Left] = st.one_of(
    st.builds(
        Alive, st.sampled_from([VICTIM, ME]), counters, counters, st.just("evil"), st.just("6.6.6.6"), st.just(6), st.just(""),
        scribbles, st.sampled_from([b"", VICTIM.encode(), peer_id(2).encode()]),
    ),
    st.builds(Left, st.sampled_from([VICTIM, ME]), counters, counters, scribbles),
)  # fmt: skip
accused = st.sampled_from([VICTIM, ME])
accusations: st.SearchStrategy[Claim] = st.one_of(
    st.builds(Suspect, st.sampled_from([VICTIM, ME]), counters, counters, st.just(peer_id(2))),
    st.builds(
        Dead, st.sampled_from([VICTIM, ME]), counters, counters, st.just(peer_id(2)), st.sampled_from(["timeout", REFUSED])
    ),
)


def as_record(claim: Claim) -> MemberRecord:
    """The same forged claim, in an exchange."""
    states = {Alive: PeerState.ALIVE, Suspect: PeerState.SUSPECT, Dead: PeerState.DEAD, Left: PeerState.LEFT}
    place = (claim.name, claim.host, claim.port) if isinstance(claim, Alive) else ("evil", "6.6.6.6", 6)
    signature = claim.signature if isinstance(claim, Alive | Left) else b"lie"
    counted = claim.node, claim.epoch, claim.incarnation
    return MemberRecord(*counted, states[type(claim)], *place, key=claim.node.encode(), signature=signature)


@settings(max_examples=150)
@given(st.lists(forged_words | accusations, max_size=10), st.lists(st.booleans(), min_size=10, max_size=10))
def test_no_other_key_holder_changes_a_nodes_address_or_name(lies: list[Claim], by_call: list[bool]) -> None:
    core = node_among(3)
    for lie, called in zip(lies, by_call, strict=False):
        if called:
            core.answer(peer_id(2), Sync(members=(as_record(lie),)), 1.0)
        else:
            core.receive(address_of(2), gossip(2, lie), 1.0)
    victim = core.swim.members[VICTIM]
    assert (victim.epoch, victim.incarnation, victim.name, victim.address) == (1, 0, "node-1", address_of(1))
    assert victim.state is not PeerState.LEFT
    assert core.swim.myself.epoch == 1 and core.swim.myself.state is PeerState.ALIVE
    assert core.swim.myself.incarnation <= len(lies), "one step for each accusation, never further"
    core.receive(address_of(1), gossip(1, alive(1, incarnation=1)), 1.1)
    assert state(core, 1) is PeerState.ALIVE, "its next word beats them all"


def test_a_forged_claim_is_counted_and_ends_the_datagram() -> None:
    core = node_among(3)
    forged = msgspec.structs.replace(alive(1, incarnation=1), name="evil")
    core.receive(address_of(2), gossip(2, forged, alive(7)), 1.0)
    assert core.swim.statistics(1.0).forged_claims_total == 1
    assert state(core, 7) is None, "no honest node passes forged words on, so none of the rest is looked at"


def test_no_second_key_takes_over_the_id_of_a_known_node() -> None:
    class AnyKey:
        """As if a second key with the same id had been found."""

        def is_key_of(self, public_key: bytes, node: NodeId) -> bool:
            return True

        def holds(self, public_key: bytes, statement: bytes, signature: bytes) -> bool:
            return signature == public_key[:4]

    core = node_among(3)
    core.swim.state.verifier._signer.verifier = AnyKey()  # type: ignore[misc]
    taken = msgspec.structs.replace(alive(1, epoch=2), key=b"second key", signature=b"seco")
    core.receive(address_of(2), gossip(2, taken), 1.0)
    assert core.swim.members[VICTIM].epoch == 1
    newcomer = msgspec.structs.replace(alive(7), key=b"second key", signature=b"seco")
    core.receive(address_of(2), gossip(2, newcomer), 1.0)
    assert state(core, 7) is PeerState.ALIVE, "the stand-in is what let it in: of an unknown node, nothing better is known"


def test_a_newcomer_without_its_key_is_asked_after_not_believed() -> None:
    core = node_among(3)
    effects = core.receive(address_of(2), gossip(2, alive(7, incarnation=3)), 1.0)
    assert state(core, 7) is None
    assert only(StartSync, effects) == [StartSync(address_of(2))]


def test_an_accusation_above_the_known_claim_counts_and_requests_an_exchange() -> None:
    core = node_among(3)
    effects = core.receive(address_of(2), gossip(2, Dead(VICTIM, 3, 9, peer_id(2), REFUSED)), 1.0)
    member = core.swim.members[VICTIM]
    assert (member.state, member.epoch, member.incarnation) == (PeerState.DEAD, 1, 0)
    assert only(StartSync, effects) == [StartSync(address_of(2))]


def test_a_record_carries_own_claim_and_verdict_together() -> None:
    core = node_among(3)
    words = alive(1, epoch=2, incarnation=4)
    core.answer(peer_id(2), Sync(members=(member_record(words, PeerState.SUSPECT),)), 1.0)
    member = core.swim.members[VICTIM]
    assert (member.state, member.epoch, member.incarnation) == (PeerState.SUSPECT, 2, 4)
    assert member.alive_claim() == words, "passed on as it was signed"


def test_a_goodbye_counts_with_its_signature_and_is_passed_on_with_it() -> None:
    core = node_among(3)
    core.receive(address_of(2), gossip(2, Left(VICTIM, 1, 0)), 1.0)
    assert state(core, 1) is PeerState.ALIVE
    core.receive(address_of(2), gossip(2, left(VICTIM, 1, 2)), 1.0)
    assert state(core, 1) is PeerState.LEFT
    assert core.swim.members[VICTIM].claim(ME) == left(VICTIM, 1, 2)
    other = node_among(3, numbered=8)
    exchange(other, core, 1.0)
    assert state(other, 1) is PeerState.LEFT


def test_a_node_with_a_restored_disk_refutes_above_its_later_claim() -> None:
    """Restored from a backup, it starts with an epoch that the mesh has seen; peers that suspect it hold the proof."""
    restored, peer = node_among(3), node_among(3, numbered=8)
    peer.receive(address_of(2), gossip(2, alive(0, epoch=7)), 1.0)
    peer.receive(address_of(2), gossip(2, Suspect(ME, 7, 0, peer_id(2))), 1.0)
    effects = restored.receive(address_of(8), gossip(8, Suspect(ME, 7, 0, peer_id(2))), 1.0)
    assert restored.swim.myself.epoch == 1 and only(EpochRenewed, effects) == []
    assert only(StartSync, effects) == [StartSync(address_of(8))]
    exchange(restored, peer, 1.1)
    assert restored.swim.myself.epoch == 8
    assert restored.swim.statistics(1.0).forged_claims_total == 0


@pytest.mark.parametrize("forge", [False, True])
def test_with_real_keys_a_node_is_believed_and_a_liar_is_not(forge: bool) -> None:
    me, peer, liar = (IdentityKey(bytes([number]) * 32) for number in (1, 2, 3))
    mine = Alive(me.node, 1, 0, "me", "10.0.0.1", 1)
    core = MembershipCore(mine, me, MembershipConfig(), Random(1), 0.0)
    speaker = liar if forge else peer
    bare = Alive(peer.node, 1, 0, "peer", "10.0.0.2", 2)
    words = msgspec.structs.replace(bare, signature=speaker.sign(alive_statement(bare)), key=speaker.public_key)
    core.receive(("10.0.0.3", 3), Gossip(sender(9), (words,)), 1.0)
    assert (peer.node in core.swim.members) is not forge
    bye = Left(peer.node, 1, 0)
    received = msgspec.structs.replace(bye, signature=speaker.sign(left_statement(bye)))
    core.receive(("10.0.0.3", 3), Gossip(sender(9), (received,)), 1.0)
    if not forge:
        assert core.swim.members[peer.node].state is PeerState.LEFT
    farewells = messages(core.leave(2.0), Gossip)
    assert all(isinstance(claim, Left) and len(claim.signature) == 64 for _, received in farewells for claim in received.claims)
