"""Decides which layers each node should hold: at its start (`choose_spans`) and after a loss (`next_move`).

Both are pure functions of the view, so that every node computes the same result without a coordinator. Aims, in this order: some
complete path; enough copies of every layer, up to those wanted; few windows; few bytes moved. One node moves at a time, chosen
by rendezvous hashing; it loads before it drops if it has the room, and otherwise drops only layers that another node serves.
While the view is frozen (many members fell silent at once) nothing moves: this node may be the one that is cut off, and a mesh
that is loading weights everywhere cannot answer.

Nodes publish what they are about to load (`Facts.intends`) before they load it. Two nodes that start at the same moment read
each other's intent; the node with the lower id keeps its choice, the other chooses again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from mesh.ids import ModelId, NodeId
from mesh.rendezvous import owners
from mesh.versions import answering, holds
from mesh.view import ModelCard, Peer, PeerState, Span, View
from routing.holders import connected
from routing.windows import SPARE_STEPS, Window, best_windows

MAX_SPANS_WEIGHED = 4
"""In a move, a node with more spans of a model than this keeps all or none of them; otherwise every subset is considered."""

PlacementShortfall = tuple[int, ...]
"""How far the mesh is from its aims: (0 if a path exists, else 1; layers without a copy; with less than 2; …)."""


@dataclass(frozen=True, slots=True)
class PlacementMove:
    """What one node should do: drop, load and serve, drop. `epoch` names the distribution of layers that it was computed for."""

    node: NodeId
    drop_first: tuple[Span, ...]  # to make room; only layers that others serve, unless the mesh has no complete path
    take: tuple[Span, ...]
    drop_after: tuple[Span, ...]
    epoch: str


def choose_spans(view: View, me: NodeId, card: ModelCard, capacity_layers: int, replicas_wanted: int = 2) -> tuple[Span, ...]:
    """The spans for `--layers auto`: the whole model if it fits, else the least replicated layers, in one window if possible.

    Of a model that is served whole only: all layers or none.

    The caller publishes the result as `Facts.intends`, calls again whenever the view changes until the result stays the same for
    a few gossip rounds, then loads. If every joining node does so, and their memory suffices, each layer is held
    `replicas_wanted` times.
    """
    if capacity_layers >= card.layers:
        return (Span(card.id, 0, card.layers),)
    if card.whole_only:
        return ()
    others = [
        (*_spans(peer.facts.spans, card), *(_spans(peer.facts.intends, card) if peer.id < me else ()))
        for peer in _counted(view, card)
        if peer.id != me
    ]
    counts = _copies(others, card.layers)
    edges = {edge for spans in others for span in spans for edge in span}
    windows = best_windows(counts, capacity_layers, replicas_wanted, me, edges)
    return tuple(Span(card.id, start, end) for start, end in windows)


def next_move(
    view: View,
    model: ModelId,
    capacities: Mapping[NodeId, int] | None = None,
    *,
    replicas_wanted: int = 2,
    card: ModelCard | None = None,
) -> PlacementMove | None:
    """The one move that the mesh should make now; the same on all nodes with the same view.

    None while a node intends to load (one move at a time), while the view is frozen, and if no single move would bring the mesh
    nearer to its aims.

    card: of the version to place; None for the version that answers to the model's id. Each version is placed by itself over the
        nodes that have its weights: copies of other weights are no replicas.
    capacities: layers of `model` that each node could hold, at least what it holds; None: what each node publishes
        (`Facts.capacity`). A node without a capacity never moves: its layers are pinned.
    """
    version = answering(view, model) if card is None else None
    card = card or (version.card if version is not None else None)
    if card is None or view.frozen:
        return None
    peers = _counted(view, card)
    if any(_spans(peer.facts.intends, card) for peer in peers):
        return None
    held = {peer.id: _spans(peer.facts.spans, card) for peer in peers}
    before = _shortfall(held, card.layers, replicas_wanted)
    if not any(before):
        return None
    epoch = _epoch(card, held)
    if capacities is None:
        capacities = {peer.id: peer.facts.capacity[model] for peer in peers if model in peer.facts.capacity}
    room = {
        peer.id: max(capacities[peer.id], _size(held[peer.id]))
        for peer in peers
        if peer.state is PeerState.ALIVE and peer.id in capacities
    }
    ranked = owners(epoch.encode(), room, len(room))
    for node in sorted(ranked, key=lambda node: room[node] <= _size(held[node])):  # nodes with spare room first
        move = _best_move(node, held, room[node], card, before, replicas_wanted, epoch)
        if move is not None:
            return move
    return None


def _best_move(
    node: NodeId,
    held: Mapping[NodeId, tuple[Window, ...]],
    capacity: int,
    card: ModelCard,
    before: PlacementShortfall,
    wanted: int,
    epoch: str,
) -> PlacementMove | None:
    """The node's best change, if it makes the mesh's shortfall strictly smaller."""
    current = held[node]
    others = {other: spans for other, spans in held.items() if other != node}
    elsewhere = _copies(others.values(), card.layers)
    options: list[tuple[PlacementShortfall, int, int, PlacementMove]] = []
    for kept in _subsets(current):
        dropped = tuple(span for span in current if span not in kept)
        taken = _to_take(kept, dropped, elsewhere, capacity, wanted, node)
        fits_beside = _size(current) + _size(taken) <= capacity
        # Without a complete path nothing is served, so that dropping layers interrupts no request.
        may_drop_first = bool(before[0]) or all(elsewhere[layer] > 0 for layer in _layers(dropped) - _layers(kept))
        if not taken or not (fits_beside or may_drop_first) or (card.whole_only and taken != ((0, card.layers),)):
            continue
        after = _shortfall({**others, node: (*kept, *taken)}, card.layers, wanted)
        first, last = ((), dropped) if fits_beside else (dropped, ())
        move = PlacementMove(node, _as_spans(first, card), _as_spans(taken, card), _as_spans(last, card), epoch)
        options.append((after, _size(taken), len(dropped), move))
    if not options:
        return None
    after, _, _, move = min(options, key=lambda option: option[:3])  # smallest shortfall, then fewest layers loaded and dropped
    return move if after < before else None


def _to_take(
    kept: tuple[Window, ...],
    dropped: tuple[Window, ...],
    elsewhere: list[int],
    capacity: int,
    wanted: int,
    node: NodeId,
) -> tuple[Window, ...]:
    """What the node should load beside the spans that it keeps: the layers with too few copies, and no more.

    A node that drops a span loads at least as many layers again, as it would serve less than before otherwise.
    """
    mine = _layers(kept)
    counts = [wanted + SPARE_STEPS if layer in mine else count for layer, count in enumerate(elsewhere)]
    short = sum(1 for count in counts if count < wanted)
    edges = {edge for span in kept for edge in span}
    return best_windows(counts, min(max(short, _size(dropped)), capacity - _size(kept)), wanted, node, edges)


def _shortfall(held: Mapping[NodeId, tuple[Window, ...]], layers: int, wanted: int) -> PlacementShortfall:
    counts = _copies(held.values(), layers)
    short = tuple(sum(1 for count in counts if count < copies) for copies in range(1, wanted + 1))
    return (0 if connected(list(held.values()), layers) else 1, *short)


def _counted(view: View, card: ModelCard) -> list[Peer]:
    """Peers whose copies count, by id: live, not draining, with the card's weights."""
    return [peer for peer in sorted(view.live(), key=lambda peer: peer.id) if not peer.facts.draining and holds(peer, card)]


def _epoch(card: ModelCard, held: Mapping[NodeId, tuple[Window, ...]]) -> str:
    """A hash of which node holds what. It changes with every join, loss and completed move, and the rendezvous order with it."""
    text = repr((card.id, card.weights, sorted(held.items())))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _subsets(spans: tuple[Window, ...]) -> Iterator[tuple[Window, ...]]:
    if len(spans) > MAX_SPANS_WEIGHED:
        yield from (spans, ())
        return
    for size in range(len(spans), -1, -1):
        yield from combinations(spans, size)


def _spans(spans: Iterable[Span], card: ModelCard) -> tuple[Window, ...]:
    return tuple(
        sorted(
            (span.start, min(span.end, card.layers)) for span in spans if span.model == card.id and 0 <= span.start < card.layers
        )
    )


def _as_spans(windows: Iterable[Window], card: ModelCard) -> tuple[Span, ...]:
    return tuple(Span(card.id, start, end) for start, end in windows)


def _layers(windows: Iterable[Window]) -> set[int]:
    return {layer for start, end in windows for layer in range(start, end)}


def _size(windows: Iterable[Window]) -> int:
    """Number of layers in memory; a layer that two spans share is loaded twice."""
    return sum(end - start for start, end in windows)


def _copies(holdings: Iterable[Iterable[Window]], layers: int) -> list[int]:
    """How many nodes hold each layer."""
    counts = [0] * layers
    for windows in holdings:
        for layer in _layers(windows):
            counts[layer] += 1
    return counts
