"""Chooses which layers a node should hold, given how often each is held by others: exactly, not by a heuristic.

Of all sets of as many layers as the node has room for, it chooses the best by these criteria, in this order:
1. the least replicated layers first: no uncovered layer is left for a second copy of another;
2. few windows, since a path visits a node once and a stage is within one window;
3. layers of which there are fewest copies beyond those wanted;
4. edges where other spans (or the model) begin and end, so that stages of different nodes fit together;
5. a hash of the node's id, so that nodes that choose at the same moment choose differently.
A dynamic programme over the layers, with the five criteria packed into one integer (sums keep the lexicographic order).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mesh.ids import NodeId
from mesh.rendezvous import score

Window = tuple[int, int]
"""Layers `[start, end)`."""

HASH_STEPS = 1024
"""Resolution of the fifth criterion."""


def best_windows(
    counts: Sequence[int], capacity: int, wanted: int, node: NodeId, edges: Collection[int] = ()
) -> tuple[Window, ...]:
    """The best windows for `node`, in order, `capacity` layers together or all layers; empty without capacity.

    counts: copies of each layer held by others. wanted: replicas after which another copy is worth little. edges: where others'
    spans begin and end.
    """
    layers = len(counts)
    room = min(capacity, layers)
    if room <= 0:
        return ()
    if room == layers:
        return ((0, layers),)
    gain = [_layer_gain(count, wanted, layers) for count in counts]
    begin = [_begin_gain(layer, edges, layers, node) for layer in range(layers)]
    finish = [_edge_gain(layer in edges or layer == layers, layers) for layer in range(layers + 1)]
    return _best(gain, begin, finish, room)


def _radices(layers: int) -> tuple[int, int, int]:
    """Weights of criteria 2, 3 and 4 in units of the fifth; each is above what all lower criteria can sum up to."""
    edge = HASH_STEPS * (layers + 1)
    spare = edge * 2 * (layers + 1)
    piece = spare * (layers + 1) * SPARE_STEPS
    return piece, spare, edge


SPARE_STEPS = 64
"""Copies beyond the wanted ones are distinguished up to this many."""


def _layer_gain(count: int, wanted: int, layers: int) -> int:
    """The value of one more copy of a layer (criteria 1 and 3)."""
    piece, spare, _ = _radices(layers)
    above_pieces = piece * (layers + 1)
    scarcity = (layers + 1) ** (wanted - count) if count < wanted else 0
    beyond = max(0, SPARE_STEPS - 1 - max(0, count - wanted))
    return scarcity * above_pieces + beyond * spare


def _begin_gain(layer: int, edges: Collection[int], layers: int, node: NodeId) -> int:
    """The value of beginning a window at a layer (criteria 2, 4 and 5)."""
    piece, _, _ = _radices(layers)
    hashed = score(b"window/%d" % layer, node)
    return -piece + _edge_gain(layer in edges or layer == 0, layers) + int(HASH_STEPS * hashed / (1.0 + hashed))


def _edge_gain(fits: bool, layers: int) -> int:
    return _radices(layers)[2] if fits else 0


Chain = tuple[int, int, "Chain | None"]
"""Windows as a linked list: start, end, the windows before."""


def _best(gain: Sequence[int], begin: Sequence[int], finish: Sequence[int], room: int) -> tuple[Window, ...]:
    """The windows of `room` layers with the greatest sum of their layers' gains, `begin[start]` and `finish[end]`.

    `outside[n]` and `inside[n]` are the best (value, windows) with n layers chosen so far: with no window open, and with the last
    window open.
    """
    none: tuple[int, Chain | None] | None = None  # so many layers cannot be chosen in this state
    outside = [none] * (room + 1)
    inside = [none] * (room + 1)
    starts: list[int] = [0] * (room + 1)  # where the open window of inside[n] began
    outside[0] = (0, None)
    for layer, layer_gain in enumerate(gain):
        new_inside, new_starts = [none] * (room + 1), [0] * (room + 1)
        for taken in range(room):
            extended, fresh = inside[taken], outside[taken]
            if extended is not None:
                new_inside[taken + 1] = (extended[0] + layer_gain, extended[1])
                new_starts[taken + 1] = starts[taken]
            if fresh is not None:
                value = fresh[0] + begin[layer] + layer_gain
                rival = new_inside[taken + 1]
                if rival is None or value > rival[0]:
                    new_inside[taken + 1] = (value, fresh[1])
                    new_starts[taken + 1] = layer
        for taken in range(room + 1):
            closing = new_inside[taken]
            if closing is not None:
                value = closing[0] + finish[layer + 1]
                rival = outside[taken]
                if rival is None or value > rival[0]:
                    outside[taken] = (value, (new_starts[taken], layer + 1, closing[1]))
        inside, starts = new_inside, new_starts
    full = outside[room]
    windows = _unrolled(full[1] if full is not None else None)
    assert sum(end - start for start, end in windows) == room
    return windows


def _unrolled(chain: Chain | None) -> tuple[Window, ...]:
    windows: list[Window] = []
    while chain is not None:
        start, end, chain = chain
        windows.append((start, end))
    return tuple(reversed(windows))
