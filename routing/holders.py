"""The holders of layers: the peers of a view that may take work for a model, and the layers that none of them holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mesh.ids import ModelId, NodeId
from mesh.versions import answering, card_of
from mesh.view import Peer, PeerState, View


@dataclass(frozen=True, slots=True)
class SpanHolder:
    """A peer and its spans of one model. A stage is within one span, also where two spans touch."""

    peer: Peer
    spans: tuple[tuple[int, int], ...]
    held: int  # distinct layers
    numerics: str  # fingerprint; empty: not published

    @property
    def node(self) -> NodeId:
        return self.peer.id

    def reach(self, layer: int) -> int:
        """The furthest end of a stage of this holder that begins at `layer`; `layer` itself if it is not held."""
        return max((end for start, end in self.spans if start <= layer < end), default=layer)


def holders(
    view: View, model: ModelId, layers: int, excluded: frozenset[NodeId] = frozenset(), weights: str | None = None
) -> list[SpanHolder]:
    """Peers that may serve layers of one version of `model`: live, not draining, not excluded, with exactly these weights.

    weights: None for the version that answers to the model's id in this view.
    Sorted by node id, so that equal views and equal random numbers give equal choices.
    """
    if weights is None:
        version = answering(view, model)
        weights = version.card.weights if version is not None else ""
    found = []
    for peer in sorted(view.live(), key=lambda peer: peer.id):
        own = card_of(peer, model)
        if peer.id in excluded or peer.facts.draining or own is None or own.weights != weights:
            continue
        spans = tuple(
            sorted(
                (span.start, min(span.end, layers))
                for span in peer.facts.spans
                if span.model == model and 0 <= span.start < min(span.end, layers)
            )
        )
        if spans:
            held = len({layer for start, end in spans for layer in range(start, end)})
            found.append(SpanHolder(peer, spans, held, own.numerics))
    return found


def gaps(found: Iterable[SpanHolder], layers: int) -> tuple[tuple[int, int], ...]:
    """Layers that none of the holders has, as `(start, end)` runs in order."""
    open_from = 0
    missing = []
    for start, end in sorted(span for holder in found for span in holder.spans):
        if start > open_from:
            missing.append((open_from, start))
        open_from = max(open_from, end)
    if open_from < layers:
        missing.append((open_from, layers))
    return tuple(missing)


def connected(spans_of: Sequence[Sequence[tuple[int, int]]], layers: int) -> bool:
    """Whether some path visits each node at most once and covers all layers. spans_of: the spans of each node.

    Only stages to the end of their span are tried: whatever continues from an earlier end also continues from there.
    """
    last_end = [max((end for _, end in spans), default=0) for spans in spans_of]
    dead_ends: set[tuple[int, frozenset[int]]] = set()

    def reaches_end(layer: int, used: frozenset[int]) -> bool:
        if layer >= layers:
            return True
        state = (layer, frozenset(node for node in used if last_end[node] > layer))
        if state in dead_ends:
            return False
        reaches: dict[int, int] = {}
        for node, spans in enumerate(spans_of):
            if node not in used:
                reach = max((end for start, end in spans if start <= layer < end), default=layer)
                if reach > layer:
                    reaches[node] = reach
        for node in sorted(reaches, key=lambda node: -reaches[node]):
            if reaches_end(reaches[node], used | {node}):
                return True
        dead_ends.add(state)
        return False

    return reaches_end(0, frozenset())


def is_suspect(holder: SpanHolder) -> bool:
    """Whether membership suspects the holder, or its engine makes no progress."""
    return holder.peer.state is PeerState.SUSPECT or holder.peer.stalled
