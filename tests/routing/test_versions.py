"""Two sets of weights under one id: no path mixes them, no copy of the one counts for the other, each is placed by itself."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mesh.errors import NoPath
from mesh.ids import ModelId, NodeId
from mesh.versions import versions
from mesh.view import Facts, Peer, PeerState, Span
from routing.coverage import coverage
from routing.path import Path, plan, uncovered
from routing.placement import choose_spans, next_move
from routing.policies import policy_named
from tests.routing.meshes import LAYERS, MODEL, card, peer, view

OLD, NEW = "0" * 64, "1" * 64


def planned(*peers: Peer, weights: str | None = None, excluded: frozenset[NodeId] = frozenset()) -> Path:
    return plan(view(*peers), MODEL, LAYERS, policy_named("mesh"), Random(1), 0.0, weights=weights, excluded=excluded)


def test_the_plain_id_stands_for_the_version_that_more_nodes_hold() -> None:
    peers = [peer("a", (0, 6), weights=OLD), peer("b", (0, 3), weights=NEW), peer("c", (3, 6), weights=NEW)]
    assert planned(*peers).nodes == ("b", "c"), "a split path of the right weights, not a whole one of others"
    assert planned(*peers, weights=OLD).nodes == ("a",)


def test_every_attempt_is_planned_with_the_requests_weights() -> None:
    peers = [peer("a", (0, 6), weights=OLD, state=PeerState.DEAD), *(peer(name, (0, 6), weights=NEW) for name in "bc")]
    with pytest.raises(NoPath):
        planned(*peers, weights=OLD)
    with pytest.raises(NoPath):
        planned(*peers, weights=NEW, excluded=frozenset({NodeId("b"), NodeId("c")}))


def test_a_node_with_spans_and_no_card_is_not_used() -> None:
    bare = Peer(NodeId("a"), "a", ("127.0.0.1", 1), facts=Facts(spans=(Span(MODEL, 0, LAYERS),)))
    with pytest.raises(NoPath):
        planned(bare)
    assert planned(bare, peer("b", (0, 6))).nodes == ("b",)


MESHES = st.lists(
    st.tuples(
        st.sampled_from([OLD, NEW]),
        st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda span: span[0] < span[1]), max_size=2),
        st.sampled_from([PeerState.ALIVE, PeerState.SUSPECT, PeerState.DEAD]),
        st.booleans(),
    ),
    min_size=1,
    max_size=7,
)


@given(mesh=MESHES, seed=st.integers(0, 9))
def test_paths_and_coverage_are_of_one_version_in_any_view(mesh: list[tuple[Any, ...]], seed: int) -> None:
    peers = {
        f"n{number}": peer(f"n{number}", *spans, weights=weights, state=state, draining=draining)
        for number, (weights, spans, state, draining) in enumerate(mesh)
    }
    seen = view(*peers.values())
    assume(versions(seen))
    covered = coverage(seen)
    for version in versions(seen):
        weights = version.card.weights
        alone = view(*(each for each in peers.values() if each.facts.models[0].weights == weights))
        (same,) = coverage(alone).values()
        assert covered[ModelId(version.name)] == same, "as if the nodes with other weights were not there"
        assert uncovered(seen, MODEL, LAYERS, weights) == uncovered(alone, MODEL, LAYERS)
        try:
            path = plan(seen, MODEL, LAYERS, policy_named("mesh"), Random(seed), 0.0, weights=weights)
        except NoPath:
            continue
        assert {peers[node].facts.models[0].weights for node in path.nodes} == {weights}
        if version.answers:
            assert plan(seen, MODEL, LAYERS, policy_named("mesh"), Random(seed), 0.0) == path


def test_each_version_is_placed_over_its_own_nodes() -> None:
    others = [peer(name, (0, 6), weights=NEW) for name in "xyz"]
    assert choose_spans(view(*others), NodeId("n"), card(weights=OLD), 3) == choose_spans(
        view(), NodeId("n"), card(weights=OLD), 3
    )
    mine = [peer("a", (0, 6), weights=OLD), peer("b", (0, 3), weights=OLD, capacity=6)]
    assert next_move(view(*others, *mine), MODEL) is None, "the answering version has all its copies"
    move = next_move(view(*others, *mine), MODEL, card=card(weights=OLD))
    assert move is not None and move.node == "b"
    assert next_move(view(*mine), MODEL, card=card(weights=OLD)) == move
    loading = Peer(NodeId("l"), "l", ("h", 1), facts=Facts(models=(card(weights=NEW),), intends=(Span(MODEL, 0, 6),)))
    assert next_move(view(*others, *mine, loading), MODEL, card=card(weights=OLD)) == move
