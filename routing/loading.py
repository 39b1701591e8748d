"""Separates the missing layers of a model that some node is loading from those that no node has and an operator must add.

Pure functions of the view: nodes publish which layers they intend to serve (`Facts.intends`) and how far they have loaded them
(`Facts.loading`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mesh.errors import ModelLoading, NoPath
from mesh.ids import ModelId
from mesh.versions import answering, card_of, versions
from mesh.view import Loading, Peer, View

UNKNOWN = Loading(0, 10)  # assumed of a node that has published its intent but no progress yet, as it has just begun
MAX_NAMED = 4  # nodes in a message


@dataclass(frozen=True, slots=True)
class BeingLoaded:
    """Layers of one model that no node serves and some load. `progress` and `eta_s` are of the layers that are ready last."""

    layers: tuple[tuple[int, int], ...]
    progress: float  # 0 to 1
    eta_s: float
    nodes: tuple[str, ...]  # names of the nodes that load any of them


def being_loaded(
    view: View, model: ModelId, missing: Iterable[tuple[int, int]], weights: str | None = None
) -> BeingLoaded | None:
    """Those of the `missing` layers that live nodes are loading; None if there are none.

    weights: of the version that lacks them; None for the version that answers to the model's id. A layer that several nodes load
    has the progress of the node that will serve it first.
    """
    missing_layers = _layers(missing)
    if weights is None:
        version = answering(view, model)
        weights = version.card.weights if version is not None else ""
    first: dict[int, Loading] = {}  # by layer: of the node that will serve it first
    names: dict[str, None] = {}  # an ordered set
    for peer in sorted(view.live(), key=lambda peer: peer.id):
        loading = peer.facts.loading.get(model, UNKNOWN)
        for layer in _intended(peer, model, weights) & missing_layers:
            names[peer.name or peer.id] = None
            if layer not in first or loading.eta_s < first[layer].eta_s:
                first[layer] = loading
    if not first:
        return None
    last = max(first.values(), key=lambda loading: (loading.eta_s, -loading.percent))
    return BeingLoaded(_runs(first), last.percent / 100, float(last.eta_s), tuple(names))


def no_path(view: View, model: ModelId, missing: tuple[tuple[int, int], ...], weights: str | None = None) -> NoPath:
    """The error for `missing` layers: ModelLoading if all of them are being loaded, else NoPath with those that no node has.

    weights: as in `being_loaded`; the message has the name that requests use for the version.
    """
    known = [each for each in versions(view) if each.card.id == model and weights in (None, each.card.weights)]
    name = known[0].name if known else model
    loads = being_loaded(view, model, missing, weights)
    if loads is None:
        return NoPath(name, missing)
    if nowhere := _layers(missing) - _layers(loads.layers):
        return NoPath(name, _runs(nowhere), loads.layers)
    return ModelLoading(name, missing, loads.progress, loads.eta_s, loads.nodes[:MAX_NAMED])


def _intended(peer: Peer, model: ModelId, weights: str) -> set[int]:
    """Layers of the version that a peer is about to serve. A peer that still hashes its files may have these weights."""
    own = card_of(peer, model)
    if peer.facts.draining or (own is not None and own.weights not in (weights, "")):
        return set()
    return _layers((span.start, span.end) for span in peer.facts.intends if span.model == model)


def _layers(runs: Iterable[tuple[int, int]]) -> set[int]:
    return {layer for start, end in runs for layer in range(start, end)}


def _runs(layers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Layers as `(start, end)` runs in order."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return tuple(runs)
