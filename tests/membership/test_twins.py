"""Which of two processes with one identity stops: one of them, the younger, whatever the order of what they hear."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from membership.core.effects import EpochRenewed, FindTwin, MemberChanged, ProcessDisplaced, TwinSeen
from membership.core.twins import ASK_AGAIN_S, ASKING_S, Twins
from mesh.ids import Address
from mesh.view import PeerState
from mesh.wire.gossip import Alive, Dead, Suspect
from mesh.wire.sync import Sync
from mesh.wire.twin import ANSWERER, ASKER, ProcessRun, TwinAnswer
from tests.membership.pieces import ME, address_of, alive, gossip, member_record, node_among, only, peer_id, signed

HERE, THERE = ("10.0.0.1", 7000), ("10.0.0.2", 7000)


def twins_at(place: Address, began: float) -> Twins:
    return Twins(Alive(ME, 1, 0, "n", *place), began)


def run_at(place: Address, age_s: float) -> ProcessRun:
    return ProcessRun(*place, "n", age_s)


@given(
    st.floats(0.0, 5.0),
    st.floats(0.0, 5.0),
    st.booleans(),
    st.lists(st.tuples(st.booleans(), st.floats(0.001, 1.5)), min_size=1, max_size=6),
)
def test_exactly_one_of_two_twins_stops_in_any_order_and_delay(
    began_one: float, began_other: float, swapped: bool, asks: list[tuple[bool, float]]
) -> None:
    """Each ask takes its time to go and to come back; ages are told on the way. The younger stops, but for what delays blur."""
    places = (THERE, HERE) if swapped else (HERE, THERE)
    both = [twins_at(place, began) for place, began in zip(places, (began_one, began_other))]
    stopped: set[int] = set()
    now = 10.0
    pending = [(by_first, delay) for by_first, delay in asks] + [(True, 0.01), (False, 0.01)]
    for by_first, delay in pending:
        asker, answerer = (0, 1) if by_first else (1, 0)
        if asker in stopped or answerer in stopped:
            continue
        question = both[asker].run(now)
        answer, _ = both[answerer].asked(question, now + delay)
        now += 2 * delay
        effects = both[asker].found(places[answerer], answer, now)
        if only(ProcessDisplaced, effects):
            stopped.add(asker)
    assert len(stopped) == 1
    if abs(began_one - began_other) > 1.5:
        assert stopped == {0 if began_one > began_other else 1}, "the younger"


def test_a_claim_from_another_address_is_checked_once_before_it_is_refuted() -> None:
    twins = twins_at(HERE, 0.0)
    assert twins.own_claim_received(THERE, 1.0) == (False, [FindTwin(THERE)])
    assert twins.own_claim_received(THERE, 2.0) == (False, []), "it is being asked already"
    assert twins.own_claim_received(THERE, 1.0 + ASKING_S) == (False, [FindTwin(THERE)]), "no answer is to be expected any more"
    assert twins.found(THERE, None, 7.0) == []
    assert twins.own_claim_received(THERE, 8.0) == (True, []), "a former run: nobody lives there"
    assert twins.own_claim_received(THERE, 7.0 + ASK_AGAIN_S) == (False, [FindTwin(THERE)])
    assert twins.own_claim_received(HERE, 8.0) == (True, []), "a former run at the same place needs no look"


def test_a_process_that_answers_itself_by_another_way_is_no_twin() -> None:
    twins = twins_at(HERE, 0.0)
    answer, effects = twins.asked(twins.run(1.0), 1.0)
    assert effects == [] and twins.found(THERE, answer, 1.0) == []
    assert twins.own_claim_received(THERE, 2.0) == (True, [])


def test_the_older_goes_on_and_speaks_up_against_the_younger() -> None:
    older = twins_at(THERE, 0.0)
    assert older.found(HERE, TwinAnswer(run_at(HERE, 3.0), ANSWERER), 100.0) == [TwinSeen(run_at(HERE, 3.0))]
    assert older.own_claim_received(HERE, 101.0) == (True, [])
    assert older.found(HERE, TwinAnswer(run_at(HERE, 3.0), ASKER), 102.0)[-1] == ProcessDisplaced(run_at(HERE, 3.0)), (
        "as its judge says"
    )


def test_many_places_are_kept_within_bounds() -> None:
    twins = twins_at(HERE, 0.0)
    for port in range(1, 200):
        twins.own_claim_received(("10.0.0.9", port), 1.0)
        twins.found(("10.0.0.9", port), TwinAnswer(run_at(("10.0.0.9", port), 0.5), ""), 1.0)
    assert twins.remembered <= 16


def elsewhere(epoch: int, incarnation: int = 0) -> Alive:
    """What a process with the identity of `ME` says at another address."""
    return signed(msgspec.structs.replace(alive(0, incarnation, epoch), host="10.0.0.77"))


def test_a_claim_of_another_process_is_held_until_its_address_is_checked() -> None:
    core = node_among(3)
    words = elsewhere(7)
    effects = core.receive(address_of(1), gossip(1, words), 1.0)
    assert only(FindTwin, effects) == [FindTwin(words.address)] and not only(EpochRenewed, effects)
    effects = core.twin_found(words.address, None, 1.1)
    assert only(EpochRenewed, effects) == [EpochRenewed(8)], "its count had been lost"
    assert only(MemberChanged, effects) and core.swim.statistics(2.0).conflicts_total >= 1


def test_a_displaced_process_falls_silent_without_a_goodbye() -> None:
    core = node_among(3)
    words = elsewhere(7)
    core.receive(address_of(1), gossip(1, words), 1.0)
    older = ProcessRun("10.0.0.77", words.port, "older", 500.0)
    effects = core.twin_found(words.address, TwinAnswer(older, ASKER), 1.1)
    assert effects == [TwinSeen(older), ProcessDisplaced(older)]
    assert core.tick(5.0) == [] and core.receive(address_of(1), gossip(1, alive(1, incarnation=3)), 5.0) == []
    assert core.twin_asked(older, 6.0)[1] == []


def test_forged_claims_do_not_prevent_a_refutation() -> None:
    core = node_among(3)
    forged = msgspec.structs.replace(elsewhere(1), signature=b"lie", key=b"")
    record = msgspec.structs.replace(member_record(forged, PeerState.SUSPECT), signature=b"lie")
    effects = core.answer(peer_id(2), Sync(members=(record,)), 1.0)[1]
    assert not only(FindTwin, effects) and core.swim.myself.incarnation == 1
    core.receive(address_of(2), gossip(2, Dead(ME, 1, 1, peer_id(2))), 2.0)
    assert core.swim.myself.incarnation == 2


def test_an_accusation_of_another_process_of_this_node_is_looked_into_too() -> None:
    core = node_among(3)
    words = elsewhere(4)
    core.receive(address_of(2), gossip(2, Suspect(ME, 4, 0, peer_id(2))), 1.0)
    effects = core.answer(peer_id(2), Sync(members=(member_record(words, PeerState.SUSPECT),)), 1.1)[1]
    assert only(FindTwin, effects) == [FindTwin(words.address)] and core.swim.myself.epoch == 1


@pytest.mark.parametrize("incarnation", [0, 3])
def test_two_that_began_alike_look_at_one_another(incarnation: int) -> None:
    """Cloned images: both count the same run."""
    core = node_among(3)
    words = elsewhere(1, incarnation)
    effects = core.receive(address_of(1), gossip(1, words), 1.0)
    assert only(FindTwin, effects) == [FindTwin(words.address)]
