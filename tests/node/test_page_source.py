"""The source of a stage's prefix pages: the live node that was sent most of the prompt's beginning and holds the layers."""

from __future__ import annotations

from random import Random
from types import MappingProxyType

import pytest

from mesh.ids import ModelId, NodeId
from mesh.view import Facts, ModelCard, Peer, PeerState, Readiness, Span, View
from node.entry.planning import Planning
from routing.path import PathStage

MODEL = ModelId("m")
CARD = ModelCard(MODEL, 4, 64, "w", "n")
NAMES = [bytes([number]) * 16 for number in range(8)]
ADDRESS = {name: ("127.0.0.1", number) for number, name in enumerate("abcd", 1)}


def stage(name: str, start: int = 0, end: int = 4) -> PathStage:
    return PathStage(NodeId(name), ADDRESS[name], start, end)


def planning(**changes: Peer) -> Planning:
    facts = Facts(spans=(Span(MODEL, 0, 4),), models=(CARD,))
    peers = {NodeId(name): Peer(NodeId(name), name, ADDRESS[name], facts=facts) for name in ADDRESS} | {
        NodeId(name): peer for name, peer in changes.items()
    }
    made = Planning(lambda: View(NodeId("a"), MappingProxyType(peers), 1), lambda: 0.0, Random(1))
    made.opened((stage("b"),), NAMES[:3])
    made.opened((stage("c"),), NAMES[:6])
    return made


def test_the_source_is_the_node_that_was_sent_most_of_the_prefix() -> None:
    made = planning()
    assert made.page_source(stage("a"), CARD, NAMES) == ADDRESS["c"]
    assert made.page_source(stage("a"), CARD, NAMES[:2]) == ADDRESS["b"], "of equals the first"
    assert made.page_source(stage("c"), CARD, NAMES) is None
    assert made.page_source(stage("c"), CARD, NAMES[:3]) is None
    assert made.page_source(stage("a"), CARD, [b"other" * 4]) is None is made.page_source(stage("a"), CARD, [])


def holder(
    model: ModelId = MODEL,
    span: tuple[int, int] = (0, 4),
    state: PeerState = PeerState.ALIVE,
    readiness: Readiness = Readiness.WARM,
    weights: str = "w",
) -> Peer:
    card = ModelCard(model, 4, 64, weights, "n")
    facts = Facts(spans=(Span(model, *span),), models=(card,), readiness=readiness)
    return Peer(NodeId("c"), "c", ADDRESS["c"], state=state, facts=facts)


@pytest.mark.parametrize(
    "peer",
    [
        holder(span=(0, 3)),
        holder(model=ModelId("other")),
        holder(state=PeerState.SUSPECT),
        holder(state=PeerState.DEAD),
        holder(readiness=Readiness.STALLED),
        holder(weights="others"),
    ],
)
def test_a_node_without_the_layers_or_weights_is_no_source(peer: Peer) -> None:
    assert planning(c=peer).page_source(stage("a"), CARD, NAMES) == ADDRESS["b"]


def test_a_node_that_restarted_is_no_source() -> None:
    made = planning()
    made.forget(NodeId("c"))
    assert made.page_source(stage("a"), CARD, NAMES) == ADDRESS["b"]
