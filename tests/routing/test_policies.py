"""Every policy ranks all candidates, each once; each by its own rule."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest
from mesh.ids import NodeId
from mesh.rendezvous import owners
from routing.policies import PeerCandidate, home, policy_named, policy_names
from routing.score import RequestWork, ScoreTerms


def candidate(name: str, cost_ms: float = 0.0, **more: object) -> PeerCandidate:
    return PeerCandidate(NodeId(name), lambda: ScoreTerms(queue=cost_ms), **more)  # type: ignore[arg-type]


def first_picks(
    policy_name: str, candidates: list[PeerCandidate], picks: int = 400, work: RequestWork | None = None
) -> Counter[str]:
    policy, rng = policy_named(policy_name), Random(7)
    return Counter(policy.pick(candidates, work or RequestWork(), rng)[0].node for _ in range(picks))


def test_an_unknown_policy_is_a_bad_request_that_lists_the_known() -> None:
    with pytest.raises(BadRequest, match="round_robin") as caught:
        policy_named("fastest")
    assert caught.value.param == "policy"
    assert all(name in str(caught.value) for name in policy_names())
    assert policy_named("").name == "mesh"
    assert [policy_named(name).name for name in policy_names()] == policy_names()


@pytest.mark.parametrize("name", policy_names())
@given(nodes=st.sets(st.text("abc", min_size=1, max_size=3), max_size=8), seed=st.integers(0, 9))
def test_a_ranking_holds_every_candidate_once(name: str, nodes: set[str], seed: int) -> None:
    policy, rng = policy_named(name), Random(seed)
    for _ in range(3):
        ranked = policy.pick([candidate(node, float(len(node))) for node in sorted(nodes)], RequestWork(prefix_key=b"k"), rng)
        assert sorted(each.node for each in ranked) == sorted(nodes)


def test_round_robin_keeps_its_place_when_peers_come_and_go() -> None:
    policy, rng = policy_named("round_robin"), Random(0)
    abc = [candidate(name) for name in "cab"]
    firsts = [policy.pick(abc, RequestWork(), rng)[0].node for _ in range(6)]
    assert "".join(firsts) in "abcabcabc"
    last = firsts[-1]
    assert (
        policy.pick([each for each in abc if each.node != last], RequestWork(), rng)[0].node
        == {"a": "b", "b": "c", "c": "a"}[last]
    )


def test_least_connections_sees_own_work_only_and_breaks_ties_at_random() -> None:
    picks = first_picks(
        "least_connections", [candidate("a", 9.0, in_flight=1), candidate("b", in_flight=2), candidate("c", 9.0, in_flight=1)]
    )
    assert picks["b"] == 0 and 150 < picks["a"] < 250


def test_weighted_response_time_takes_the_mean_for_unmeasured_peers() -> None:
    picks = first_picks(
        "weighted_response_time", [candidate("fast", response_ms=100.0), candidate("slow", response_ms=300.0)], picks=2000
    )
    assert 0.70 < picks["fast"] / 2000 < 0.80
    newcomer = first_picks(
        "weighted_response_time",
        [candidate("a", response_ms=200.0), candidate("b", response_ms=200.0), candidate("new")],
        picks=3000,
    )
    assert 900 < newcomer["new"] < 1100


def test_power_of_two_takes_the_better_of_two() -> None:
    picks = first_picks("power_of_two", [candidate(str(cost), float(cost)) for cost in range(8)], picks=2800)
    assert picks["7"] == 0
    assert 600 < picks["0"] < 800  # in two of eight draws a quarter of the time


def test_the_mesh_policy_always_considers_itself_the_warmest_peer_and_the_home() -> None:
    many = [candidate(f"n{index}", 50.0) for index in range(30)]
    assert first_picks("mesh", [*many, candidate("self", 1.0, mine=True)])["self"] >= 390
    warm = RequestWork(cached_tokens={NodeId("n3"): 10, NodeId("n4"): 900})
    assert first_picks("mesh", [*many[:4], candidate("n4", 1.0), *many[5:]], work=warm)["n4"] >= 390
    at_home = RequestWork(prefix_key=b"prompt")
    name = owners(b"prompt", [each.node for each in many], 1)[0]
    cheap_home = [candidate(each.node, 1.0) if each.node == name else each for each in many]
    assert first_picks("mesh", cheap_home, work=at_home)[name] >= 390
    assert first_picks("mesh", cheap_home)[name] < 60


def test_the_mesh_policy_explores_with_its_probability() -> None:
    picks = first_picks("mesh", [candidate("bad", 1e6), candidate("good", 1.0)], picks=4000)
    assert 5 <= picks["bad"] <= 60


def test_an_overloaded_home_passes_the_prompt_to_the_next_in_its_order() -> None:
    names = [NodeId(name) for name in "abcd"]
    ranked = owners(b"prompt", names, 4)
    even = [candidate(name, load=4.0) for name in names]
    assert home(even, RequestWork(prefix_key=b"prompt")) == ranked[:1]
    hot = [candidate(name, load=40.0 if name == ranked[0] else 4.0) for name in names]
    assert home(hot, RequestWork(prefix_key=b"prompt")) == ranked[1:2]
    assert home(even, RequestWork()) == [] == home([], RequestWork(prefix_key=b"x"))


def test_the_score_is_computed_only_for_compared_candidates() -> None:
    asked: list[str] = []

    def price(name: str) -> ScoreTerms:
        asked.append(name)
        return ScoreTerms()

    many = [PeerCandidate(NodeId(f"n{index}"), lambda index=index: price(f"n{index}")) for index in range(20)]  # type: ignore[misc]
    policy_named("power_of_two").pick(many, RequestWork(), Random(1))
    assert len(asked) == len(set(asked)) == 2
