"""Many losses seen as one, and when this node had better not act on what it sees."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from membership.core.effects import LossBatch, MemberChanged, MembershipEffect, ViewFrozen
from membership.core.outlook import FROZEN_SETTLE_S, PATIENCE_S, RESIGNED_S, SETTLE_S, SETTLED_S
from mesh.view import PeerState
from mesh.wire.gossip import REFUSED, Dead, Suspect
from tests.membership.pieces import ME, address_of, alive, gossip, left, node_among, only, peer_id, run_to

ALIVE, SUSPECT, DEAD = PeerState.ALIVE, PeerState.SUSPECT, PeerState.DEAD


class Stage:
    """An outlook over a table of members that a test changes by hand."""

    def __init__(self, peers: int) -> None:
        self.core = node_among(peers)
        self.received: list[MembershipEffect] = self.wait(100.0)  # from here on all of them are the last stable view
        self.received = []

    def wait(self, until: float) -> list[MembershipEffect]:
        received: list[MembershipEffect] = []
        outlook = self.core.outlook
        while outlook.deadline <= until:
            now = outlook.deadline
            received += outlook.tick(now)
            assert outlook.deadline > now, "it used its deadline up"
        return received

    def set(self, number: int, state: PeerState, now: float, *, restarted: bool = False) -> list[MembershipEffect]:
        member = self.core.swim.members[peer_id(number)]
        before, member.state = member.state, state
        self.core.swim.members.put(member)
        return self.core.outlook.follow([MemberChanged(member.node, before, state, restarted)], now)


def test_a_rack_lost_within_a_while_is_one_cut() -> None:
    stage = Stage(10)
    for step, number in enumerate((3, 1, 7)):
        stage.set(number, DEAD, 100 + 0.1 * step)
        assert not stage.core.outlook.settled
    assert stage.wait(100.3) == []
    assert stage.wait(101) == [LossBatch((peer_id(1), peer_id(3), peer_id(7)))]
    assert stage.core.outlook.settled and stage.core.outlook.loss_batches == 1


def test_a_cut_waits_for_open_suspicions_but_not_for_ever() -> None:
    stage = Stage(20)
    stage.set(1, SUSPECT, 100)
    stage.set(2, SUSPECT, 100)
    stage.set(1, DEAD, 101)
    assert stage.wait(103) == []
    stage.set(2, DEAD, 103)
    assert stage.wait(103 + SETTLE_S) == [LossBatch((peer_id(1), peer_id(2)))]
    stage.set(3, SUSPECT, 110)
    stage.set(4, DEAD, 110)
    assert stage.wait(110 + PATIENCE_S) == [LossBatch((peer_id(4),))]


def test_a_batch_in_a_frozen_view_waits_for_slow_probes() -> None:
    stage = Stage(6)
    for number in (1, 2, 3):
        stage.set(number, SUSPECT, 100)
    assert stage.core.outlook.frozen
    for number, at in ((1, 102), (2, 103), (3, 104)):
        stage.set(number, DEAD, at)
    assert stage.wait(104 + PATIENCE_S / 2) == []
    stage.set(4, DEAD, 104 + PATIENCE_S / 2)
    assert stage.wait(104 + PATIENCE_S / 2 + FROZEN_SETTLE_S) == [LossBatch(tuple(peer_id(n) for n in (1, 2, 3, 4)))]


def test_returned_members_are_in_no_batch_and_left_members_not_lost() -> None:
    stage = Stage(10)
    stage.set(1, DEAD, 100)
    stage.set(1, ALIVE, 100.1)
    assert stage.wait(101) == [] and stage.core.outlook.settled
    stage.set(2, DEAD, 102)
    stage.set(3, PeerState.LEFT, 102)
    stage.set(4, ALIVE, 102, restarted=True)
    assert stage.wait(103) == [LossBatch((peer_id(2), peer_id(4)), (peer_id(3),))]


def test_the_view_is_frozen_while_more_than_a_third_is_silent() -> None:
    stage = Stage(8)  # nine with this node
    for number in (1, 2, 3):
        assert stage.set(number, SUSPECT, 100) == [], "a third is not more than a third"
    assert stage.set(4, DEAD, 100) == [ViewFrozen(True)]
    assert stage.set(5, DEAD, 100) == [], "reported once"
    assert stage.set(1, ALIVE, 101) == []
    assert stage.set(2, ALIVE, 101) == [ViewFrozen(False)]


def test_one_silent_node_freezes_no_mesh_however_small() -> None:
    stage = Stage(1)
    assert stage.set(1, SUSPECT, 100) == stage.set(1, DEAD, 103) == []
    stage = Stage(2)
    assert stage.set(1, DEAD, 100) == [] and stage.set(2, DEAD, 100) == [ViewFrozen(True)]


def test_members_with_refused_ports_are_not_missing() -> None:
    stage = Stage(8)
    for number in range(1, 8):
        stage.core.swim.members[peer_id(number)].cause = REFUSED
        assert stage.set(number, DEAD, 100) == []
    assert stage.core.outlook.stable_count == 2
    assert only(LossBatch, stage.wait(101)) == [LossBatch(tuple(peer_id(number) for number in range(1, 8)))]


def test_separate_losses_do_not_freeze_and_simultaneous_ones_thaw_later() -> None:
    stage = Stage(9)
    for step, number in enumerate(range(1, 8)):
        assert only(ViewFrozen, stage.set(number, DEAD, 100 + 3 * step)) == []
        stage.wait(100 + 3 * step + SETTLED_S)
    stage = Stage(9)
    for number in range(1, 8):
        stage.set(number, DEAD, 100)
    assert stage.core.outlook.frozen
    assert only(ViewFrozen, stage.wait(100 + RESIGNED_S - 0.1)) == []
    assert only(ViewFrozen, stage.wait(100 + RESIGNED_S)) == [ViewFrozen(False)]
    assert stage.core.outlook.deadline == math.inf


def test_left_members_and_newcomers_do_not_freeze_the_view() -> None:
    stage = Stage(9)
    for number in range(1, 8):
        assert only(ViewFrozen, stage.set(number, PeerState.LEFT, 100)) == []
    core = node_among(3)
    for number in range(4, 20):  # newcomers who die before the view ever settles
        core.receive(address_of(number), gossip(number, alive(number)), 0.1)
        core.receive(address_of(1), gossip(1, Dead(peer_id(number), 1, 0, peer_id(1), REFUSED)), 0.2)
    assert core.outlook.stable_count < 20 and not core.outlook.frozen


def test_the_core_follows_its_members_by_itself() -> None:
    core = node_among(3)
    run_to(core, 4.0, answers=True)
    received = core.receive(address_of(1), gossip(1, Dead(peer_id(2), 1, 0, peer_id(1), REFUSED), left(peer_id(3), 1, 0)), 5.0)
    assert only(LossBatch, received) == []
    assert only(LossBatch, run_to(core, 6.0, answers=True)) == [LossBatch((peer_id(2),), (peer_id(3),))]
    core.leave(7.0)
    assert core.deadline == math.inf


def test_a_core_sees_itself_cut_off() -> None:
    core = node_among(4)
    run_to(core, 4.0, answers=True)
    received = []
    for number in (1, 2, 3):
        accusation = Suspect(peer_id(number), 1, 0, peer_id(4))
        received += core.receive(address_of(4), gossip(4, accusation), 5.0)
    assert only(ViewFrozen, received) == [ViewFrozen(True)] and core.outlook.frozen
    assert ME not in core.outlook._suspected


states = st.sampled_from([ALIVE, SUSPECT, DEAD, PeerState.LEFT])
moves = st.lists(st.tuples(st.integers(1, 6), states, st.sampled_from([0.0, 0.1, 1.0, 3.0, 70.0])), max_size=30)


@given(moves)
def test_counted_by_steps_it_is_as_counted_anew(steps: list[tuple[int, PeerState, float]]) -> None:
    """Beside it runs the definition: the last stable view as a set of names."""
    stage = Stage(6)
    members, outlook, now = stage.core.swim.members, stage.core.outlook, 200.0
    roster = {member.node for member in members}
    received: list[str] = []
    fallen: set[str] = set()
    for number, state, wait_s in steps:
        node, before = peer_id(number), members[peer_id(number)].state
        if state is not before:
            stage.set(number, state, now)
            if before in (ALIVE, SUSPECT) and state in (DEAD, PeerState.LEFT):
                fallen.add(node)
            elif state is ALIVE and before not in (ALIVE, SUSPECT):
                fallen.discard(node)
        roster -= {member.node for member in members if member.state is PeerState.LEFT}
        now += wait_s
        for cut in only(LossBatch, stage.wait(now)):
            received += [*cut.lost, *cut.left]
            assert set(cut.lost) | set(cut.left) <= fallen
            fallen -= {*cut.lost, *cut.left}
        if not (outlook._suspected or outlook._lost or outlook._newcomers) and not members.suspects:
            roster = {member.node for member in members if member.live}
        missing = {node for node in roster if members[node].state in (SUSPECT, DEAD)}
        assert outlook.stable_count == len(roster)
        assert outlook.frozen == (len(missing) > 1 and len(missing) * 3 > len(roster))
    stage.wait(now + 100)
    if not members.suspects:
        assert not outlook.frozen and outlook.settled
