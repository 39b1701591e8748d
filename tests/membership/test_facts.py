"""Facts and exchanges: only owners write, deltas are sent, invalid ones are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membership.core.core import MembershipCore
from membership.core.effects import FactsChanged, MemberChanged, PushFacts
from mesh.errors import LocalError
from mesh.ids import ModelId
from mesh.view import Facts, ModelCard, PeerState, Span
from mesh.wire.facts_map import keys_of
from mesh.wire.gossip import Dead, Gossip
from mesh.wire.sync import (
    MAX_OWNER_BYTES,
    BadSync,
    FactsDelta,
    FactsEntry,
    Sync,
    Synced,
    decode_sync,
    decode_synced,
    encode,
)
from tests.membership.pieces import (
    ME,
    address_of,
    alive,
    core_of,
    exchange,
    gossip,
    member_record,
    node_among,
    only,
    peer_id,
    run_to,
    sender,
    state,
)

FACTS = Facts(http="http://x", spans=(Span(ModelId("m"), 0, 4),), models=(ModelCard(ModelId("m"), 8, 64, "w", "n"),))


def received(number: int, version: int, facts: Facts = FACTS, epoch: int = 1) -> FactsDelta:
    """Returns all facts of a node at `version`."""
    keys = keys_of(facts)
    first = version - len(keys) + 1
    entries = tuple(FactsEntry(key, first + place, value) for place, (key, value) in enumerate(keys.items()))
    return FactsDelta(peer_id(number), epoch, 0, version, 0, entries)


def facts_of(core: MembershipCore, number: int) -> Facts:
    peer = core.peer(peer_id(number))
    assert peer is not None
    return peer.facts


def test_published_facts_are_in_the_own_view_at_once_and_pushed_to_two_peers() -> None:
    core = node_among(5)
    effects = core.publish(FACTS, 1.0)
    assert FactsChanged(ME) in effects
    pushes = only(PushFacts, effects)
    assert len({push.to for push in pushes}) == 2
    assert pushes[0].sync.deltas[0].upto == 3
    assert facts_of(core, 0) == FACTS
    assert core.publish(FACTS, 2.0) == [], "the same again is no news"


def test_facts_too_large_for_peers_are_our_own_fault_and_change_nothing() -> None:
    core = node_among(1)
    core.publish(FACTS, 1.0)
    with pytest.raises(LocalError, match=str(MAX_OWNER_BYTES)):
        core.publish(Facts(documents={"x": "y" * MAX_OWNER_BYTES}), 2.0)
    assert facts_of(core, 0) == FACTS


def test_pushed_news_is_passed_on_to_others_and_old_news_is_not() -> None:
    core = node_among(5)
    push = Sync(deltas=(received(1, 3),))
    _, effects = core.answer(peer_id(2), push, 1.0)
    assert only(FactsChanged, effects) == [FactsChanged(peer_id(1))]
    passed_on = only(PushFacts, effects)
    assert len(passed_on) == 2
    assert {push.to for push in passed_on} <= {address_of(n) for n in (3, 4, 5)}, "not to its owner, nor back"
    for stale in (received(1, 3), received(1, 2, Facts(http="x", pid=1)), received(1, 9, epoch=0)):
        assert core.answer(peer_id(2), Sync(deltas=(stale,)), 1.1)[1] == []
    assert facts_of(core, 1) == FACTS


def test_facts_of_an_earlier_run_are_not_shown() -> None:
    core = node_among(2)
    core.answer(peer_id(1), Sync(deltas=(received(1, 3),)), 1.0)
    core.receive(address_of(1), gossip(1, alive(1, epoch=2)), 2.0)
    assert facts_of(core, 1) == Facts()
    core.answer(peer_id(1), Sync(deltas=(received(1, 3, epoch=2),)), 3.0)
    assert facts_of(core, 1) == FACTS


def test_facts_of_strangers_and_records_that_do_not_decode_are_left_out() -> None:
    core = node_among(1)
    nested = b"\x81\xa1a" * 5000 + b"\xc0"
    bodies = {
        "http": b"\xc1",
        "pid": b"\xff",
        "spans\nm": b"\x93\x01\x02\x03",
        "documents\nx": nested,
        "http\nx": b"\xa0",
        "new": b"?",
    }
    entries = tuple(FactsEntry(key, version, body) for version, (key, body) in enumerate(bodies.items(), 1))
    delta = FactsDelta(peer_id(1), 1, 0, 6, 0, entries)
    _, effects = core.answer(peer_id(1), Sync(deltas=(received(7, 3), delta)), 1.0)
    assert only(FactsChanged, effects) == [FactsChanged(peer_id(1))] and core.facts.rejected == 5
    assert facts_of(core, 1) == Facts()
    assert len(core.facts.map_of(peer_id(1)) or ()) == 6, "kept all the same: a newer version may know what it means"


@pytest.mark.parametrize(
    "facts",
    [
        Facts(spans=(Span(ModelId("m"), 0, 10**12),)),
        Facts(intends=(Span(ModelId("m"), -1, 4),)),
        Facts(models=(ModelCard(ModelId("m"), 10**12, 64, "w", "n"),)),
        Facts(models=(ModelCard(ModelId("m"), 8, 0, "w", "n"),)),
        Facts(capacity={ModelId("m"): -1}),
        Facts(uncompiled="x" * 513),
    ],
)
def test_facts_that_no_node_has_are_left_out(facts: Facts) -> None:
    core = node_among(1)
    core.answer(peer_id(1), Sync(deltas=(received(1, 5, facts),)), 1.0)
    assert core.facts.rejected == 1 and facts_of(core, 1) == Facts()


def test_a_copy_of_our_own_record_that_is_ahead_makes_ours_go_further_ahead() -> None:
    core = node_among(1)
    core.publish(FACTS, 1.0)
    _, effects = core.answer(peer_id(1), Sync(deltas=(received(0, 9, Facts(http="forged")),)), 2.0)
    assert core.facts.known(ME) == (1, 12) and facts_of(core, 0) == FACTS
    assert only(PushFacts, effects), "the mesh must hear ours"


def test_after_one_exchange_both_sides_know_the_same() -> None:
    one, other = node_among(3), node_among(0)
    other_id = peer_id(8)
    other = core_of(alive(8), one.config, one.rng)
    other.publish(Facts(http="other"), 0.0)
    one.publish(FACTS, 0.0)
    one.answer(peer_id(2), Sync(deltas=(received(2, 4),)), 0.0)
    exchange(other, one, 1.0)
    assert one.fingerprint == other.fingerprint
    assert facts_of(one, 8).http == "other" and facts_of(other, 2) == FACTS and facts_of(other, 0) == FACTS
    synced, effects = one.answer(other_id, other.ask(), 2.0)
    assert synced == Synced(ME) and effects == [], "nothing is left to say"


def test_an_asker_that_records_this_node_dead_gets_its_refutation() -> None:
    one, other = node_among(1), node_among(3)
    mistaken = core_of(alive(1), one.config, one.rng)
    mistaken.receive(address_of(0), gossip(0, alive(0)), 0.0)
    mistaken.swim.claims.declare(Dead(ME, 1, 0, peer_id(1)), 0.0)
    exchange(mistaken, one, 1.0)
    assert state(mistaken, 0) is PeerState.ALIVE
    assert one.swim.myself.incarnation == 1 and other.swim.myself.incarnation == 0


def test_an_exchange_brings_the_dead_with_their_age_so_that_ghosts_end() -> None:
    core = node_among(1)
    dead = member_record(alive(5), PeerState.DEAD, 100.0)
    ghost = member_record(alive(6), PeerState.DEAD, core.config.forget_s + 1)
    _, effects = core.answer(peer_id(1), Sync(members=(dead, ghost)), 1000.0)
    assert only(MemberChanged, effects) == [MemberChanged(peer_id(5), None, PeerState.DEAD)]
    assert core.swim.members[peer_id(5)].since == 900.0
    assert state(core, 6) is None


def test_an_exchange_is_no_independent_confirmation() -> None:
    core = node_among(6)
    accused = member_record(alive(5), PeerState.SUSPECT)
    for teller in (1, 2, 3):
        core.answer(peer_id(teller), Sync(members=(accused,)), 0.0)
    suspicion = core.swim.members[peer_id(5)].suspicion
    assert suspicion is not None and suspicion.confirmations == 0


def test_a_node_that_left_applies_and_sends_nothing_more() -> None:
    core = node_among(2)
    core.leave(1.0)
    synced, effects = core.answer(peer_id(1), Sync(digest=node_among(5).ask().digest), 2.0)
    assert (synced, effects) == (Synced(ME), [])


def test_an_answer_stops_at_its_limit_and_the_next_one_goes_on() -> None:
    teller = node_among(10)
    big = Facts(documents={str(n): "y" * 30_000 for n in range(33)})
    for number in range(1, 11):
        teller.answer(peer_id(number), Sync(deltas=(received(number, 33, big),)), 0.0)
    asker = core_of(alive(50), teller.config, teller.rng)
    ask: Sync | None = asker.ask()
    rounds = 0
    while ask is not None:
        synced, _ = teller.answer(asker.me, decode_sync(encode(ask)), 1.0)
        ask, _ = asker.learn(address_of(0), decode_synced(encode(synced)), 1.0)
        rounds += 1
        assert rounds < 10
    assert asker.fingerprint == teller.fingerprint
    assert all(facts_of(asker, number) == big for number in range(1, 11))
    assert rounds > 3, "or the limit was not met"


@given(st.binary(max_size=300))
def test_any_bytes_are_a_sync_or_a_bad_sync(raw: bytes) -> None:
    for decode in (decode_sync, decode_synced):
        try:
            decode(raw)
        except BadSync:
            pass


def test_few_news_of_an_exchange_are_passed_on_a_whole_mesh_not() -> None:
    few, many = node_among(0), node_among(0)
    members = tuple(member_record(alive(n)) for n in range(1, 30))
    few.answer(peer_id(1), Sync(members=members[:4]), 1.0)
    assert len(few.swim.state.rumours) == 4
    many.answer(peer_id(1), Sync(members=members), 1.0)
    assert len(many.swim.state.rumours) == 1, "only the teller's word about itself"
    assert len(run_to(many, 1.0)) > 0


def test_a_message_from_a_member_with_equal_knowledge_asks_for_nothing() -> None:
    core = node_among(2)
    effects = core.receive(address_of(1), Gossip(sender(1, fingerprint=core.fingerprint)), 5.0)
    assert [type(effect).__name__ for effect in effects] == ["LoadMeasured"]
