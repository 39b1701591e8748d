"""The versions of a model, and which of them answers to the plain id: the same on every node."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.ids import ModelId, NodeId
from mesh.versions import ModelVersion, answering, named, replicas, versions
from mesh.view import Facts, ModelCard, Peer, PeerState, Span, View

TINY, LAYERS = ModelId("tiny"), 4
A, B, C = "a" * 64, "b" * 64, "c" * 64


def peer(
    name: str,
    weights: str,
    *spans: tuple[int, int],
    written_at_s: int = 100,
    model: ModelId = TINY,
    state: PeerState = PeerState.ALIVE,
    draining: bool = False,
) -> Peer:
    card = ModelCard(model, LAYERS, 64, weights, "n", written_at_s=written_at_s)
    facts = Facts(spans=tuple(Span(model, *span) for span in spans), models=(card,), draining=draining)
    return Peer(NodeId(name), name, ("127.0.0.1", 1), state=state, facts=facts)


def view(*peers: Peer, me: str = "me") -> View:
    return View(NodeId(me), MappingProxyType({each.id: each for each in peers}))


def summary(*peers: Peer) -> list[tuple[str, str, bool]]:
    return [(version.name, version.card.weights[:1], version.answers) for version in versions(view(*peers))]


def test_equal_weights_on_all_nodes_are_one_version() -> None:
    assert summary(peer("1", A, (0, 4)), peer("2", A, (0, 2)), peer("3", A)) == [("tiny", "a", True)]
    only = answering(view(peer("1", A, (0, 4)), peer("2", A, (0, 2)), peer("3", A)), TINY)
    assert only is not None
    assert (only.holders, only.known_to, only.complete) == (("1", "2"), ("1", "2", "3"), True)


def test_the_version_with_more_nodes_answers_and_others_have_hashed_names() -> None:
    peers = [peer("1", A, (0, 4)), peer("2", B, (0, 4)), peer("3", B, (0, 4))]
    assert summary(*peers) == [("tiny", "b", True), ("tiny@aaaaaaaa", "a", False)]
    assert summary(*peers[:2], peer("3", B, (0, 4), state=PeerState.DEAD), peer("4", A, (0, 4)))[0] == ("tiny", "a", True)


def test_files_without_a_span_in_service_and_draining_nodes_are_no_copies() -> None:
    idle = [peer(name, B) for name in "23456"]
    assert summary(peer("1", A, (0, 4)), *idle)[0] == ("tiny", "a", True)
    leaving = [peer(name, B, (0, 4), draining=True) for name in "23456"]
    assert summary(peer("1", A, (0, 4)), *leaving)[0] == ("tiny", "a", True)


def test_an_incomplete_version_does_not_answer_beside_a_complete_one() -> None:
    peers = [peer("1", A, (0, 4)), *(peer(name, B, (0, 3)) for name in "234")]
    assert summary(*peers)[0] == ("tiny", "a", True)
    assert summary(*peers, peer("5", B, (2, 4)))[0] == ("tiny", "b", True)
    assert summary(*(peer(name, B, (0, 3)) for name in "234"), peer("1", A, (1, 4)))[0] == ("tiny", "b", True), "both lack some"


def test_with_equal_copies_the_version_with_the_newer_oldest_copy_answers() -> None:
    old = peer("1", A, (0, 4), written_at_s=100)
    assert summary(old, peer("2", B, (0, 4), written_at_s=200))[0] == ("tiny", "b", True)
    assert summary(old, peer("2", B, (0, 4), written_at_s=50))[0] == ("tiny", "a", True)
    copied = peer("3", A, (0, 4), written_at_s=300)
    assert summary(old, copied, peer("2", B, (0, 4), written_at_s=200), peer("4", B, (0, 4), written_at_s=200))[0][1] == "b"


def test_of_equally_old_ones_the_lower_hash_answers() -> None:
    assert summary(peer("1", C, (0, 4)), peer("2", B, (0, 4)))[0] == ("tiny", "b", True)


def test_a_node_that_hashes_its_files_counts_for_no_known_version() -> None:
    assert summary(peer("1", "")) == [("tiny", "", True)]
    assert summary(peer("1", ""), peer("2", "")) == [("tiny", "", True)]
    assert summary(peer("1", ""), peer("2", A, (0, 4))) == [("tiny", "a", True)]


def test_names_have_as_many_digits_as_tell_the_versions_apart() -> None:
    alike = "a" * 10 + "b" * 54
    names = [name for name, _, _ in summary(peer("1", C, (0, 4)), peer("2", A), peer("3", alike))]
    assert names == ["tiny", "tiny@aaaaaaaaaaa", "tiny@aaaaaaaaaab"]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("tiny", B),
        (f"tiny@{A}", A),
        ("tiny@aaaaaaaa", A),
        ("tiny@bbbbbbbb", B),
        ("tiny@aaaaaaa", None),
        ("tiny@cccccccc", None),
        ("tiny@AAAAAAAA", None),
        ("tiny@", None),
        ("other@aaaaaaaa", None),
        ("odd@name", C),
        ("", None),
    ],
)
def test_a_request_selects_a_version_by_id_or_digits_of_its_hash(name: str, weights: str | None) -> None:
    seen = view(
        peer("1", A, (0, 4)),
        peer("2", B, (0, 4)),
        peer("3", B, (0, 4)),
        peer("4", C, (0, 4), model=ModelId("odd@name")),
    )
    found = named(seen, name)
    assert (found.card.weights if found is not None else None) == weights


def test_digits_that_two_versions_share_name_neither() -> None:
    alike = "a" * 10 + "b" * 54
    seen = view(peer("1", C, (0, 4)), peer("2", A), peer("3", alike))
    assert named(seen, "tiny@aaaaaaaa") is None
    assert named(seen, "tiny@aaaaaaaaaab") is not None


def test_copies_are_counted_within_one_version() -> None:
    seen = view(peer("1", A, (0, 4)), peer("2", B, (0, 3)), peer("3", B, (1, 4)))
    cards = {version.card.weights: version.card for version in versions(seen)}
    assert replicas(seen, cards[A]) == [1, 1, 1, 1]
    assert replicas(seen, cards[B]) == [1, 2, 2, 1]


WEIGHTS = st.sampled_from([A, B, C, "", "w", "a" * 9, "no hash\n"])
SPANS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=2)
PEERS = st.lists(
    st.tuples(WEIGHTS, SPANS, st.sampled_from(PeerState), st.booleans(), st.integers(0, 2), st.sampled_from(["tiny", "tiny@"])),
    max_size=7,
)


@given(drawn=PEERS, order=st.randoms(use_true_random=False))
def test_equal_views_give_equal_versions_and_one_answers_for_each_id(drawn: list[tuple[Any, ...]], order: object) -> None:
    peers = [
        peer(f"n{number}", weights, *spans, written_at_s=written, model=ModelId(model), state=state, draining=draining)
        for number, (weights, spans, state, draining, written, model) in enumerate(drawn)
    ]
    found = versions(view(*peers))
    order.shuffle(peers)  # type: ignore[attr-defined]
    assert versions(view(*peers, me="another")) == found
    by_id: dict[str, list[ModelVersion]] = {}
    for version in found:
        by_id.setdefault(version.card.id, []).append(version)
    for of_one in by_id.values():
        assert [version.answers for version in of_one] == [True, *[False] * (len(of_one) - 1)]
        assert len({version.card.weights for version in of_one}) == len(of_one)
        assert not any(version.complete for version in of_one) or of_one[0].complete
    live = {each.id for each in peers if each.state in (PeerState.ALIVE, PeerState.SUSPECT)}
    assert {node for version in found for node in version.known_to} <= live


def test_a_card_with_an_endless_hash_is_refused_when_it_is_decoded() -> None:
    card = msgspec.to_builtins(peer("1", "a" * 129).facts.models[0])
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(card, ModelCard)
    msgspec.convert({**card, "weights": A}, ModelCard)
