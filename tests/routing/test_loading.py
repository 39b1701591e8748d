"""Layers that are being loaded are distinguished from those that no node has."""

from __future__ import annotations

from random import Random

import pytest

from mesh.errors import ModelLoading, NoPath
from mesh.view import Loading, Peer, PeerState
from routing.loading import UNKNOWN, BeingLoaded, being_loaded, no_path
from routing.path import plan
from routing.policies import policy_named
from tests.routing.meshes import LAYERS, MODEL, peer, view

HALF = Loading(50, 12)


def why_not(*peers: Peer) -> NoPath:
    with pytest.raises(NoPath) as caught:
        plan(view(*peers), MODEL, LAYERS, policy_named("mesh"), Random(0), 0.0)
    return caught.value


def test_layers_that_a_peer_loads_have_progress_and_time() -> None:
    error = why_not(peer("a", (0, 4)), peer("b", intends=((4, 6),), loading=HALF))
    assert isinstance(error, ModelLoading)
    assert (error.gaps, error.progress, error.eta_s) == (((4, 6),), 0.5, 12.0)
    assert str(error) == "layers 4:6 of tiny are being loaded by b: 50% done, about 12 s to go"


def test_layers_that_no_peer_has_or_loads_are_named_alone() -> None:
    error = why_not(peer("a", (0, 2)), peer("b", intends=((4, 6),), loading=HALF))
    assert not isinstance(error, ModelLoading) and error.gaps == ((2, 4),)
    assert "no live peer holds layers 2:4 of tiny" in str(error) and "--layers 2:4 (layers 4:6 are being loaded)" in str(error)


@pytest.mark.parametrize(
    "other",
    [
        peer("b", intends=((4, 6),), state=PeerState.DEAD),
        peer("b", intends=((4, 6),), draining=True),
        peer("b", intends=((4, 6),), weights="w2"),
        peer("b", intends=((0, 4),)),
    ],
)
def test_loads_of_dead_and_draining_peers_and_other_weights_do_not_count(other: Peer) -> None:
    assert not isinstance(why_not(peer("a", (0, 4)), other), ModelLoading)


def test_the_earliest_load_of_each_layer_and_the_latest_layer_count() -> None:
    slow, fast = Loading(10, 90), Loading(80, 3)
    peers = (peer("a", intends=((0, 4),), loading=slow), peer("b", intends=((0, 6),), loading=fast))
    assert being_loaded(view(*peers), MODEL, ((0, 6),)) == BeingLoaded(((0, 6),), 0.8, 3.0, ("a", "b"))
    alone = (peer("a", intends=((0, 4),), loading=slow), peer("b", intends=((4, 6),), loading=fast))
    assert being_loaded(view(*alone), MODEL, ((0, 6),)) == BeingLoaded(((0, 6),), 0.1, 90.0, ("a", "b"))


def test_an_intent_without_progress_has_just_begun() -> None:
    loads = being_loaded(view(peer("a", intends=((0, 1), (2, 6)))), MODEL, ((0, 6),))
    assert loads == BeingLoaded(((0, 1), (2, 6)), UNKNOWN.percent / 100, UNKNOWN.eta_s, ("a",))
    assert being_loaded(view(peer("a", (0, 6))), MODEL, ()) is None


def test_only_loads_of_these_weights_or_unidentified_ones_count() -> None:
    old = [peer("a", (0, 3), weights="w1"), peer("b", intends=((3, 6),), weights="w1")]
    others = [peer("c", (0, 2), weights="w2"), peer("d", intends=((2, 6),), weights="w2")]
    hashing = peer("e", intends=((4, 6),), weights="")
    seen = view(*old, *others, hashing)
    assert being_loaded(seen, MODEL, ((3, 6),), "w1") == BeingLoaded(((3, 6),), 0.0, 10.0, ("b", "e"))
    assert being_loaded(seen, MODEL, ((2, 6),), "w2") == BeingLoaded(((2, 6),), 0.0, 10.0, ("d", "e"))
    assert being_loaded(view(*old[:1], *others), MODEL, ((3, 6),), "w1") is None
    assert str(no_path(view(*old[:1], *others), MODEL, ((3, 6),), "w1")).startswith("no live peer holds layers 3:6 of tiny")
    assert isinstance(no_path(seen, MODEL, ((2, 6),), "w2"), ModelLoading)


def test_the_remedy_for_missing_layers_names_the_model() -> None:
    assert "start one with: mesh up --join HOST:PORT --model big --layers 0:2" in str(NoPath("big", ((0, 2),)))
