"""Small meshes through storms drawn from seeds. `make sim` runs ten thousand of them."""

from __future__ import annotations

import pytest

from membership.core import members, refutation
from membership.simulation.storm import FaultStorm
from mesh.view import PeerState
from mesh.wire.gossip import Claim

BLOCKS, SEEDS_A_BLOCK = 4, 25


@pytest.mark.parametrize("block", range(BLOCKS))
def test_after_any_storm_all_see_one_mesh_and_nobody_was_wronged(block: int) -> None:
    for seed in range(block * SEEDS_A_BLOCK, (block + 1) * SEEDS_A_BLOCK):
        storm = FaultStorm(seed)
        assert storm.faults() == [], f"seed {seed}: {storm.blows}"


def test_a_seed_is_one_storm() -> None:
    one, again, other = FaultStorm(3), FaultStorm(3), FaultStorm(4)
    assert one.faults() == again.faults() == other.faults() == []
    assert (one.blows, one.network.trace()) == (again.blows, again.network.trace())
    assert one.network.trace() != other.network.trace()


def test_storms_catch_a_node_that_never_refutes(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(self: refutation.Refutation, claim: Claim, words: object, now: float) -> list[Claim]:
        return []

    monkeypatch.setattr(refutation.Refutation, "apply", deaf)
    assert any(FaultStorm(seed).faults() for seed in range(20))


def test_storms_catch_a_goodbye_that_a_verdict_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """One side of a cut heard it, the other finds a silent node; when they meet, who knows better is not to be talked over."""
    monkeypatch.setitem(members.SEVERITY, PeerState.LEFT, 2)
    monkeypatch.setitem(members.SEVERITY, PeerState.DEAD, 3)
    assert any("took it for dead" in fault for seed in range(60) for fault in FaultStorm(seed).faults())
