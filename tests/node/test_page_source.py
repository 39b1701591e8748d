"""Where a stage may get pages from: the live node that was sent most of the prompt's beginning, and holds the layers."""

from __future__ import annotations

from random import Random
from types import MappingProxyType

import pytest

from mesh.ids import ModelId, NodeId
from mesh.view import Facts, Peer, PeerState, Readiness, Span, View
from node.generation_events import StageAt
from node.planning import Planning

MODEL = ModelId("m")
NAMES = [bytes([number]) * 16 for number in range(8)]
ADDRESS = {name: ("127.0.0.1", number) for number, name in enumerate("abcd", 1)}


def stage(name: str, start: int = 0, end: int = 4) -> StageAt:
    return StageAt(NodeId(name), ADDRESS[name], start, end)


def planning(**changes: Peer) -> Planning:
    facts = Facts(spans=(Span(MODEL, 0, 4),))
    peers = {NodeId(name): Peer(NodeId(name), name, ADDRESS[name], facts=facts) for name in ADDRESS} | {
        NodeId(name): peer for name, peer in changes.items()
    }
    made = Planning(lambda: View(NodeId("a"), MappingProxyType(peers), 1), lambda: 0.0, Random(1))
    made.opened((stage("b"),), NAMES[:3])
    made.opened((stage("c"),), NAMES[:6])
    return made


def test_the_node_that_was_sent_most_is_named_and_nobody_where_the_stage_has_as_much() -> None:
    made = planning()
    assert made.page_source(stage("a"), MODEL, NAMES) == ADDRESS["c"]
    assert made.page_source(stage("a"), MODEL, NAMES[:2]) == ADDRESS["b"], "of equals the first"
    assert made.page_source(stage("c"), MODEL, NAMES) is None
    assert made.page_source(stage("c"), MODEL, NAMES[:3]) is None
    assert made.page_source(stage("a"), MODEL, [b"other" * 4]) is None is made.page_source(stage("a"), MODEL, [])


@pytest.mark.parametrize(
    "peer",
    [
        Peer(NodeId("c"), "c", ADDRESS["c"], facts=Facts(spans=(Span(MODEL, 0, 3),))),
        Peer(NodeId("c"), "c", ADDRESS["c"], facts=Facts(spans=(Span(ModelId("other"), 0, 4),))),
        Peer(NodeId("c"), "c", ADDRESS["c"], state=PeerState.SUSPECT, facts=Facts(spans=(Span(MODEL, 0, 4),))),
        Peer(NodeId("c"), "c", ADDRESS["c"], state=PeerState.DEAD, facts=Facts(spans=(Span(MODEL, 0, 4),))),
        Peer(NodeId("c"), "c", ADDRESS["c"], facts=Facts(spans=(Span(MODEL, 0, 4),), readiness=Readiness.STALLED)),
    ],
)
def test_a_node_without_the_layers_or_that_may_not_answer_is_not_asked(peer: Peer) -> None:
    assert planning(c=peer).page_source(stage("a"), MODEL, NAMES) == ADDRESS["b"]


def test_a_node_that_restarted_has_nothing() -> None:
    made = planning()
    made.forget(NodeId("c"))
    assert made.page_source(stage("a"), MODEL, NAMES) == ADDRESS["b"]
