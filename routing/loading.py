"""What of a model is missing because it is being loaded: told apart from what no node has, for which something must be done.

Pure functions of the view: nodes tell which layers they intend to serve (`Facts.intends`) and how far they are with them
(`Facts.loading`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mesh.errors import ModelLoading, NoPath
from mesh.ids import ModelId
from mesh.versions import answering, card_of, versions
from mesh.view import Loading, Peer, View

UNKNOWN = Loading(0, 10)  # of a node that has told its intent and not yet how far it is: it has just begun
MAX_NAMED = 4  # nodes in a message


@dataclass(frozen=True, slots=True)
class BeingLoaded:
    """Layers of one model that no node serves and some load. `progress` and `eta_s` are those of the layers that come last."""

    layers: tuple[tuple[int, int], ...]
    progress: float  # 0 to 1
    eta_s: float
    nodes: tuple[str, ...]  # names of those that load any of them


def being_loaded(
    view: View, model: ModelId, missing: Iterable[tuple[int, int]], weights: str | None = None
) -> BeingLoaded | None:
    """What of the `missing` layers live nodes are loading; None: nothing of it.

    weights: of the version that lacks them; None for the one that answers to the model's id. A layer that several nodes load
    counts as that of the one which will be there first.
    """
    wanted = {layer for start, end in missing for layer in range(start, end)}
    if weights is None:
        version = answering(view, model)
        weights = version.card.weights if version is not None else ""
    first: dict[int, Loading] = {}
    names: dict[str, None] = {}
    for peer in sorted(view.live(), key=lambda peer: peer.id):
        told = peer.facts.loading.get(model, UNKNOWN)
        for layer in _intended(peer, model, weights) & wanted:
            names[peer.name or peer.id] = None
            if layer not in first or told.eta_s < first[layer].eta_s:
                first[layer] = told
    if not first:
        return None
    last = max(first.values(), key=lambda told: (told.eta_s, -told.percent))
    return BeingLoaded(_runs(first), last.percent / 100, float(last.eta_s), tuple(names))


def no_path(view: View, model: ModelId, missing: tuple[tuple[int, int], ...], weights: str | None = None) -> NoPath:
    """The error that says why the `missing` layers are: all of them are being loaded, or some are nowhere.

    weights: as of `being_loaded`; the message calls the version by the name that requests ask for it by.
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
    """A node that still hashes its files may turn out to have these weights."""
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
