"""Builds views for the routing tests: which node holds which layers, and its load."""

from __future__ import annotations

from types import MappingProxyType

from mesh.ids import ModelId, NodeId
from mesh.view import Facts, Load, Loading, ModelCard, Peer, PeerState, Readiness, Span, View

MODEL = ModelId("tiny")
LAYERS = 6


def card(numerics: str = "n1", weights: str = "w1", layers: int = LAYERS) -> ModelCard:
    return ModelCard(MODEL, layers, 4096, weights, numerics)


def peer(
    name: str,
    *spans: tuple[int, int],
    state: PeerState = PeerState.ALIVE,
    draining: bool = False,
    readiness: Readiness = Readiness.WARM,
    load: Load | None = None,
    load_at: float = 0.0,
    rtt_s: float | None = 0.001,
    region: str = "",
    numerics: str = "n1",
    weights: str = "w1",
    layers: int = LAYERS,
    capacity: int | None = None,
    intends: tuple[tuple[int, int], ...] = (),
    loading: Loading | None = None,
) -> Peer:
    return Peer(
        id=NodeId(name),
        name=name,
        address=("127.0.0.1", 1000 + sum(name.encode())),
        region=region,
        state=state,
        facts=Facts(
            spans=tuple(Span(MODEL, start, end) for start, end in spans),
            models=(card(numerics, weights, layers),),
            draining=draining,
            readiness=readiness,
            capacity={} if capacity is None else {MODEL: capacity},
            intends=tuple(Span(MODEL, start, end) for start, end in intends),
            loading={} if loading is None else {MODEL: loading},
        ),
        load=load or Load(step_ms=1.0 * sum(end - start for start, end in spans)),
        load_at=load_at,
        rtt_s=rtt_s,
    )


def view(*peers: Peer, me: str = "me") -> View:
    return View(NodeId(me), MappingProxyType({each.id: each for each in peers}))
