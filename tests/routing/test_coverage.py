"""Coverage: how many peers hold each layer, and which changes are reported."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.ids import ModelId, NodeId
from mesh.versions import replicas
from mesh.view import Facts, ModelCard, Peer, PeerState, Readiness, Span, View
from routing.coverage import Coverage, CoverageChanged, CoverageRun, changes, coverage

MODEL = ModelId("m")
LAYERS = 6
CARD = ModelCard(MODEL, LAYERS, 64, "w", "n")


def peer(name: str, *spans: tuple[int, int], state: PeerState = PeerState.ALIVE, readiness: Readiness = Readiness.WARM) -> Peer:
    facts = Facts(
        spans=tuple(Span(MODEL, start, end) for start, end in spans),
        models=(CARD,),
        draining=readiness is Readiness.DRAINING,
        readiness=readiness,
    )
    return Peer(NodeId(name), name, ("h", 1), state=state, facts=facts)


def view(*peers: Peer) -> View:
    return View(NodeId("me"), {each.id: each for each in peers})


def of(*peers: Peer) -> Coverage:
    return coverage(view(*peers))[MODEL]


def test_layers_with_equally_many_copies_are_one_run() -> None:
    assert of(peer("a", (0, 4)), peer("b", (2, 4))).runs == (
        CoverageRun(0, 2, 1, 1),
        CoverageRun(2, 4, 2, 2),
        CoverageRun(4, 6, 0, 0),
    )
    assert of(peer("a")).runs == (CoverageRun(0, 6, 0, 0),)
    assert of(peer("a", (0, 3), (3, 6))).runs == (CoverageRun(0, 6, 1, 1),), "spans that touch are one run"
    assert of(peer("a", (0, 4), (2, 6))).runs == (CoverageRun(0, 6, 1, 1),), "what two spans share is held once"


def test_a_suspect_stalled_or_overloaded_peer_has_copies_that_are_not_ready() -> None:
    healthy = peer("a", (0, 6))
    for other in (
        peer("b", (0, 6), state=PeerState.SUSPECT),
        peer("b", (0, 6), readiness=Readiness.STALLED),
        peer("b", (0, 6), readiness=Readiness.OVERLOADED),
    ):
        assert of(healthy, other).runs == (CoverageRun(0, 6, 2, 1),)


def test_dead_and_draining_peers_have_no_copies() -> None:
    for other in (
        peer("b", (0, 6), state=PeerState.DEAD),
        peer("b", (0, 6), state=PeerState.LEFT),
        peer("b", (0, 6), readiness=Readiness.DRAINING),
    ):
        assert of(peer("a", (0, 6)), other).runs == (CoverageRun(0, 6, 1, 1),)


def test_changes_to_and_from_the_last_ready_copy_are_reported() -> None:
    both = coverage(view(peer("a", (0, 6)), peer("b", (0, 6))))
    last = coverage(view(peer("a", (0, 6)), peer("b", (2, 6))))
    none = coverage(view(peer("b", (2, 6))))
    assert changes(both, last) == [CoverageChanged(MODEL, 2, 1, ((0, 2),))]
    assert changes(last, none) == [CoverageChanged(MODEL, 1, 0, ((0, 2),))]
    assert changes(none, both) == [CoverageChanged(MODEL, 0, 2, ((0, 6),))]
    assert changes(last, {}) == [CoverageChanged(MODEL, 1, 0, ())]
    assert changes(none, none) == changes({}, none) == []


def test_changes_above_two_copies_are_not_reported() -> None:
    three = coverage(view(*(peer(name, (0, 6)) for name in "abc")))
    two = coverage(view(*(peer(name, (0, 6)) for name in "ab")))
    assert changes(three, two) == []


windows = st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)).map(lambda w: (w[0], max(w[0] + 1, w[1])))
peers = st.lists(st.tuples(st.lists(windows, max_size=3), st.sampled_from(PeerState)), max_size=5)


@given(peers)
def test_runs_equal_a_count_layer_by_layer(held: list[tuple[list[tuple[int, int]], PeerState]]) -> None:
    shown = view(peer("z"), *(peer(f"p{number}", *spans, state=state) for number, (spans, state) in enumerate(held)))
    runs = coverage(shown)[MODEL].runs
    by_layer = [(run.live, run.ready) for run in runs for _ in range(run.start, run.end)]
    assert [live for live, _ in by_layer] == replicas(shown, CARD)
    alive = View(shown.me, {each.id: each for each in shown.peers.values() if each.state is PeerState.ALIVE})
    assert [ready for _, ready in by_layer] == replicas(alive, CARD)
