"""The formulas of suspicion and dissemination, against their sources' tables."""

from __future__ import annotations

import math
from typing import Any

import pytest

from membership.core.config import MembershipConfig
from membership.core.dissemination import Rumours, transmit_limit
from membership.core.suspicion import Suspicion, expected_confirmations, minimum_s, remaining_s
from mesh.wire.datagram_codec import claim_bytes
from mesh.wire.gossip import Alive, Dead, Suspect
from tests.membership.pieces import alive, peer_id


@pytest.mark.parametrize(
    ("confirmations", "expected", "elapsed_s", "remaining"),
    [
        # The table of memberlist's TestSuspicion_remainingSuspicionTime: k = 3, min 2 s, max 30 s, rounded there to ms.
        (0, 3, 0.0, 30.0),
        (1, 3, 2.0, 14.0),
        (2, 3, 3.0, 4.81),
        (3, 3, 4.0, -2.0),
        (4, 3, 5.0, -3.0),
        (5, 3, 10.0, -8.0),
        (0, 0, 0.5, 1.5),
    ],
)
def test_remaining_time_shrinks_logarithmically(confirmations: int, expected: int, elapsed_s: float, remaining: float) -> None:
    assert remaining_s(confirmations, expected, elapsed_s, 2.0, 30.0) == pytest.approx(remaining, abs=0.005)


@pytest.mark.parametrize(("live", "wanted_s"), [(1, 2.0), (3, 2.0), (10, 2.0), (100, 4.0), (1000, 6.0)])
def test_the_shortest_suspicion_grows_with_the_decades_of_the_mesh(live: int, wanted_s: float) -> None:
    assert minimum_s(4.0, live, 0.5) == pytest.approx(wanted_s)


@pytest.mark.parametrize(("live", "expected"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (100, 3)])
def test_nobody_waits_for_more_confirmations_than_there_are_peers(live: int, expected: int) -> None:
    assert expected_confirmations(3, live) == expected


def test_an_accuser_counts_once_and_an_unnamed_one_not_at_all() -> None:
    named = Suspicion(0.0, 3, 2.0, 8.0, peer_id(1))
    assert named.deadline == 8.0
    assert not named.confirm([peer_id(1)])
    assert named.confirm([peer_id(2)]) and not named.confirm([peer_id(2)])
    assert named.deadline == 5.0
    unnamed = Suspicion(0.0, 3, 2.0, 8.0, None)
    assert unnamed.confirm([peer_id(1)])
    assert unnamed.deadline == 8.0, "the first name may be that of the unnamed accuser"


@pytest.mark.parametrize(("live", "limit"), [(1, 6), (2, 6), (9, 12), (100, 18), (1000, 20), (10_000, 20)])
def test_small_meshes_get_more_copies_than_the_formula_alone(live: int, limit: int) -> None:
    assert transmit_limit(4, live) == limit
    assert transmit_limit(16, live) >= 16 * math.ceil(math.log10(live + 1))


def test_the_least_sent_rumour_goes_first_and_each_is_limited() -> None:
    rumours = Rumours()
    rumours.put(alive(1))
    rumours.put(alive(2))
    one = len(claim_bytes(alive(1)))
    assert rumours.take(one, 2) == (alive(2),), "the newest of those told equally often"
    assert rumours.take(one, 2) == (alive(1),)
    assert rumours.take(2 * one, 2) == (alive(2), alive(1))
    assert rumours.take(1000, 2) == () and not rumours


def test_a_later_claim_takes_the_place_of_an_earlier_one_about_the_same_node() -> None:
    rumours = Rumours()
    rumours.put(alive(1))
    suspect = Suspect(peer_id(1), 1, 0, peer_id(2))
    rumours.put(suspect)
    assert rumours.take(1000, 9) == (suspect,)


def test_first_claims_are_not_counted_nor_repeated_in_one_message() -> None:
    rumours = Rumours()
    rumours.put(dead := Dead(peer_id(1), 1, 0, peer_id(2)))
    assert rumours.take(1000, 1, [dead]) == (dead,)
    assert rumours.take(1000, 1) == (dead,)
    assert rumours.take(len(claim_bytes(dead)) - 1, 1, [dead]) == ()


@pytest.mark.parametrize(
    "bad", [{"probe_period_s": 0.0}, {"probe_timeout_s": 0.5}, {"members_max": 10**6}, {"suspicion_multiplier": float("nan")}]
)
def test_a_number_out_of_bounds_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        MembershipConfig(**bad)


def test_an_own_claim_that_could_never_spread_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="host"):
        Alive(peer_id(1), 1, 0, "name", "h" * 47, 1)
