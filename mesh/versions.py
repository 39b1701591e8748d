"""The versions of each model: sets of weights under one id, and the rule which of them serves requests for the plain id.

Two checkpoints that differ in any byte are two versions, with an identity each (`mesh.manifest`), though both may be served
under one id. Copies are counted, paths are planned and answers are repeated within one version. Requests for the plain id go to
one version only, chosen by a pure function of the view, so that all nodes with equal views choose the same one:

1. a version of which all layers are held comes before a version that lacks some and so could not answer;
2. then the version that more nodes hold;
3. then the newer version. A version is as old as its oldest copy on a live node, so that copying its files to one
   more node does not make it newer. Nodes publish when their files were written; no clock is read to compare them;
4. then the lower hash.

The other versions are requested by `ID@` and the first digits of their hash, eight or more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mesh.ids import ModelId, NodeId
from mesh.view import ModelCard, Peer, View

NAME_DIGITS = 8  # of the hash in a version's name; more where the hashes of two versions begin alike
_DIGITS = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One set of weights under a model's id."""

    card: ModelCard  # of the first node that serves some of its layers, else of the first that has the card
    name: str  # in requests: the id where `answers`, else the id and digits of its hash
    answers: bool  # requests for the plain id
    holders: tuple[NodeId, ...]  # live nodes that serve some of its layers and do not drain
    known_to: tuple[NodeId, ...]  # live nodes that publish its card, the holders included
    complete: bool  # the holders together serve every layer
    written_at_s: int  # of its oldest copy


def versions(view: View) -> tuple[ModelVersion, ...]:
    """Returns all versions of all models of live peers, sorted by id; of each id the answering version first.

    A node that still hashes its files publishes no weights yet: it counts for no version while another node publishes one.
    """
    published: dict[ModelId, dict[str, list[Peer]]] = {}
    for peer in sorted(view.live(), key=lambda peer: peer.id):
        for card in peer.facts.models:
            published.setdefault(card.id, {}).setdefault(card.weights, []).append(peer)
    found: list[ModelVersion] = []
    for model, by_weights in sorted(published.items()):
        if len(by_weights) > 1:
            by_weights.pop("", None)
        ranked = sorted((_version(model, weights, peers) for weights, peers in by_weights.items()), key=_rank)
        found += [ranked[0], *(_other(version, by_weights) for version in ranked[1:])]
    return tuple(found)


def answering(view: View, model: ModelId) -> ModelVersion | None:
    """Returns the version that serves the plain id; None where no live peer has the model."""
    return next((version for version in versions(view) if version.card.id == model), None)


def named(view: View, name: str) -> ModelVersion | None:
    """Returns the version of a name in a request: a model's id, or `ID@` and digits of a hash. None: there is no such version."""
    known = versions(view)
    if (found := next((version for version in known if version.card.id == name), None)) is not None:
        return found
    model, _, digits = name.rpartition("@")
    if len(digits) < NAME_DIGITS or not _DIGITS.fullmatch(digits):
        return None
    fitting = [version for version in known if version.card.id == model and version.card.weights.startswith(digits)]
    return fitting[0] if len(fitting) == 1 else None


def plain_id(name: str, weights: str) -> str:
    """Returns the model's id in a version's name."""
    model, _, digits = name.rpartition("@")
    return model if model and len(digits) >= NAME_DIGITS and weights.startswith(digits) else name


def card_of(peer: Peer, model: ModelId) -> ModelCard | None:
    """Returns the peer's card of the model; a peer has one version of it at most."""
    return next((card for card in peer.facts.models if card.id == model), None)


def holds(peer: Peer, card: ModelCard) -> bool:
    """Returns whether the peer's layers of this model are of this version."""
    own = card_of(peer, card.id)
    return own is not None and own.weights == card.weights


def replicas(view: View, card: ModelCard) -> list[int]:
    """Returns how many live peers hold each layer of this version, as a list of length `card.layers`."""
    counts = [0] * card.layers
    for peer in view.live():
        spans = [span for span in peer.facts.spans if span.model == card.id] if holds(peer, card) else []
        for layer in {layer for span in spans for layer in range(span.start, min(span.end, card.layers))}:
            counts[layer] += 1
    return counts


def _version(model: ModelId, weights: str, peers: list[Peer]) -> ModelVersion:
    """Returns a version under the plain id. `peers` publish it, in the order of their ids."""
    assert peers, "a version is published by at least one peer"
    serving = [peer for peer in peers if any(span.model == model for span in peer.facts.spans)]
    holders = [peer for peer in serving if not peer.facts.draining]
    cards = [card for peer in (*serving, *peers) if (card := card_of(peer, model)) is not None]
    spans = [(span.start, span.end) for peer in holders for span in peer.facts.spans if span.model == model]
    return ModelVersion(
        card=cards[0],
        name=model,
        answers=True,
        holders=tuple(peer.id for peer in holders),
        known_to=tuple(peer.id for peer in peers),
        complete=_reach(spans) >= cards[0].layers,
        written_at_s=min((card.written_at_s for card in cards if card.written_at_s), default=0),
    )


def _reach(spans: Iterable[tuple[int, int]]) -> int:
    """Returns the number of layers, from the first on, that the spans cover without a gap."""
    reached = 0
    for start, end in sorted(spans):
        if start > reached:
            break
        reached = max(reached, end)
    return reached


def _rank(version: ModelVersion) -> tuple[bool, int, int, str]:
    """Returns the sort key of a version; the version with the least key serves the plain id."""
    return not version.complete, -len(version.holders), -version.written_at_s, version.card.weights


def _other(version: ModelVersion, all_weights: Iterable[str]) -> ModelVersion:
    """Returns the version under the id and as many digits of its hash as distinguish it from the other versions."""
    mine = version.card.weights
    others = [weights for weights in all_weights if weights != mine]
    shared = (count for count in range(NAME_DIGITS, len(mine)) if not any(each.startswith(mine[:count]) for each in others))
    return replace(version, name=f"{version.card.id}@{mine[: next(shared, len(mine))]}", answers=False)
