"""Bugs planted on purpose: the simulations above must see each of them, or they show nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from membership import evidence, health, hearing, suspicion, swim
from membership.effects import Effect
from membership.members import Member
from membership.simulation.checkers import all_see, converged, deaths_of, detection_s
from membership.simulation.network import Network
from mesh.view import PeerState

Mutation = Callable[[pytest.MonkeyPatch], None]


def crash_is_known_soon(seed: int = 1) -> bool:
    network = Network(seed, loss=0.01)
    ids = network.grow(30)
    killed_at = network.now
    network.crash(ids[7])
    network.run(3)
    took = detection_s(network, ids[7], killed_at)
    return len(took) == 29 and took[-1] < 0.5


def broken_links_kill_nobody(seed: int = 1) -> bool:
    network = Network(seed, loss=0.01)
    ids = network.grow(12)
    for number in range(6):
        network.break_links(ids[number])
        network.run(1.0)
    return not deaths_of(network, ids)


def firewall_kills_nobody(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(12)
    network.nodes[ids[3]].refuses_all = True
    network.break_links(ids[3])
    network.run(5)
    return not deaths_of(network, ids)


def block_of_ten_seconds_kills_nobody(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(10)
    network.pause(ids[4])
    network.run(10)
    network.resume(ids[4])
    network.run(5)
    return not deaths_of(network, ids) and converged(network)


def silent_death_is_found(seed: int = 1) -> bool:
    network = Network(seed)
    ids = network.grow(10)
    network.kill(ids[4])
    network.run(8)
    return all_see(network, ids[4], PeerState.DEAD)


def convicted_at_once(self: evidence.Evidence, member: Member, now: float, *, hearsay: bool = False) -> list[Effect]:
    self.declare(evidence.Dead(member.node, member.epoch, member.incarnation, self.me, evidence.REFUSED), now)
    return []


def mutant(target: object, name: str, value: object) -> Mutation:
    return lambda patch: patch.setattr(target, name, value)


MUTANTS: list[tuple[str, Mutation, Callable[[], bool]]] = [
    ("links are not watched", mutant(evidence.Evidence, "watch", lambda self, again=False: []), crash_is_known_soon),
    ("refused deaths are heard like silent ones", mutant(hearing, "REFUSED", "never"), crash_is_known_soon),
    (
        "an end of a link is proof enough",
        mutant(evidence.Evidence, "open_case", convicted_at_once),
        broken_links_kill_nobody,
    ),
    (
        "an answer does not close the case",
        mutant(evidence.Evidence, "close_case", lambda self, node: None),
        firewall_kills_nobody,
    ),
    (
        "nobody looks whether a suspect listens",
        mutant(evidence.Evidence, "_look", lambda self, member, now: []),
        block_of_ten_seconds_kills_nobody,
    ),
    (
        "stalled means dead",
        mutant(
            swim.Swim,
            "_convict",
            lambda self, member, now: self.declare(swim.Dead(member.node, member.epoch, member.incarnation, self.me), now),
        ),
        block_of_ten_seconds_kills_nobody,
    ),
    ("suspicions never end", mutant(suspicion.Suspicion, "deadline", property(lambda self: 1e9)), silent_death_is_found),
    ("a failed probe accuses nobody", mutant(swim.Swim, "_probe_failed", lambda self, probe, now: None), silent_death_is_found),
    ("a node trusts nothing it sees", mutant(health.LocalHealth, "factor", property(lambda self: 60)), silent_death_is_found),
]


@pytest.mark.parametrize(("name", "plant", "holds"), MUTANTS, ids=[name for name, _, _ in MUTANTS])
def test_a_planted_bug_is_caught(name: str, plant: Mutation, holds: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert holds()
    plant(monkeypatch)
    assert not holds(), name
