"""The sets of weights that are known under each model's id, and which one of them answers to it.

Two checkpoints that differ in any byte are two versions, with an identity each (`mesh.manifest`), though both may be served
under one id. Copies are counted, paths are planned and answers are repeated within one version. Only one version
answers to the plain id, by a rule that is a pure function of the view, so that all nodes with one view say the same:

1. a version whose layers are all held before one that lacks some: the other could not answer at all;
2. the version that more nodes hold;
3. the newer one. A version is as old as its oldest copy among the live nodes that know it: copying its files to one
   more node does not make it newer. Nodes tell when their files were written; no clock is read to compare them;
4. the lower hash.

The others are asked for by `ID@` and the first digits of their hash, eight or more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mesh.ids import ModelId, NodeId
from mesh.view import ModelCard, Peer, View

NAME_DIGITS = 8  # of the hash in a version's name: more where two versions of one id have these in common
_DIGITS = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One set of weights under a model's id."""

    card: ModelCard  # as the first node tells it that serves some of its layers, else the first that knows it
    name: str  # what requests ask for it by: the id where it answers to that, else the id and digits of its hash
    answers: bool  # to the plain id
    holders: tuple[NodeId, ...]  # live nodes that stay and serve some of its layers
    known_to: tuple[NodeId, ...]  # live nodes that tell of it, the holders among them
    complete: bool  # the holders together serve every layer
    written_at_s: int  # its oldest copy


def versions(view: View) -> tuple[ModelVersion, ...]:
    """All versions of all models that live peers know, by id; of one id the answering one first.

    A node that still hashes its files knows no weights yet: it is of no version while another node knows one.
    """
    told: dict[ModelId, dict[str, list[Peer]]] = {}
    for peer in sorted(view.live(), key=lambda peer: peer.id):
        for card in peer.facts.models:
            told.setdefault(card.id, {}).setdefault(card.weights, []).append(peer)
    found: list[ModelVersion] = []
    for model, by_weights in sorted(told.items()):
        if len(by_weights) > 1:
            by_weights.pop("", None)
        ranked = sorted((_version(model, weights, peers) for weights, peers in by_weights.items()), key=_rank)
        found += [ranked[0], *(_other(version, by_weights) for version in ranked[1:])]
    return tuple(found)


def answering(view: View, model: ModelId) -> ModelVersion | None:
    """The version that answers to the plain id; None where no live peer knows the model."""
    return next((version for version in versions(view) if version.card.id == model), None)


def named(view: View, name: str) -> ModelVersion | None:
    """The version that a request means by `name`: a model's id, or `ID@` and digits of a hash. None: there is none such."""
    known = versions(view)
    if (found := next((version for version in known if version.card.id == name), None)) is not None:
        return found
    model, _, digits = name.rpartition("@")
    if len(digits) < NAME_DIGITS or not _DIGITS.fullmatch(digits):
        return None
    fitting = [version for version in known if version.card.id == model and version.card.weights.startswith(digits)]
    return fitting[0] if len(fitting) == 1 else None


def plain_id(name: str, weights: str) -> str:
    """The model's id in a version's name."""
    model, _, digits = name.rpartition("@")
    return model if model and len(digits) >= NAME_DIGITS and weights.startswith(digits) else name


def card_of(peer: Peer, model: ModelId) -> ModelCard | None:
    """What the peer says of the model; it holds one version of it at most."""
    return next((card for card in peer.facts.models if card.id == model), None)


def holds(peer: Peer, card: ModelCard) -> bool:
    """Whether the peer's layers of this model are of this version."""
    own = card_of(peer, card.id)
    return own is not None and own.weights == card.weights


def replicas(view: View, card: ModelCard) -> list[int]:
    """How many live peers hold each layer of this version; length `card.layers`."""
    counts = [0] * card.layers
    for peer in view.live():
        spans = [span for span in peer.facts.spans if span.model == card.id] if holds(peer, card) else []
        for layer in {layer for span in spans for layer in range(span.start, min(span.end, card.layers))}:
            counts[layer] += 1
    return counts


def _version(model: ModelId, weights: str, peers: list[Peer]) -> ModelVersion:
    """As if it answered to the id; `peers` know it, in the order of their ids."""
    serving = [peer for peer in peers if any(span.model == model for span in peer.facts.spans)]
    staying = [peer for peer in serving if not peer.facts.draining]
    cards = [card for peer in (*serving, *peers) if (card := card_of(peer, model)) is not None]
    spans = [(span.start, span.end) for peer in staying for span in peer.facts.spans if span.model == model]
    return ModelVersion(
        card=cards[0],
        name=model,
        answers=True,
        holders=tuple(peer.id for peer in staying),
        known_to=tuple(peer.id for peer in peers),
        complete=_reach(spans) >= cards[0].layers,
        written_at_s=min((card.written_at_s for card in cards if card.written_at_s), default=0),
    )


def _reach(spans: Iterable[tuple[int, int]]) -> int:
    """Up to which layer, from the first one on, none is missing."""
    reached = 0
    for start, end in sorted(spans):
        if start > reached:
            break
        reached = max(reached, end)
    return reached


def _rank(version: ModelVersion) -> tuple[bool, int, int, str]:
    """The least answers to the id."""
    return not version.complete, -len(version.holders), -version.written_at_s, version.card.weights


def _other(version: ModelVersion, all_weights: Iterable[str]) -> ModelVersion:
    """The version under a name of its own: as many digits as tell it from the others of its id."""
    mine = version.card.weights
    others = [weights for weights in all_weights if weights != mine]
    shared = (count for count in range(NAME_DIGITS, len(mine)) if not any(each.startswith(mine[:count]) for each in others))
    return replace(version, name=f"{version.card.id}@{mine[: next(shared, len(mine))]}", answers=False)
