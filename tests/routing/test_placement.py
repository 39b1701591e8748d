"""Every layer has two copies if memory allows; one node moves at a time; served layers stay served."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import combinations, pairwise

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.ids import NodeId
from mesh.versions import replicas
from mesh.view import Facts, Peer, PeerState, Span, View
from routing.holders import connected
from routing.placement import PlacementMove, choose_spans, next_move
from routing.windows import best_windows
from tests.routing.meshes import LAYERS, MODEL, card, peer, view


def spans_of(node: Peer) -> tuple[tuple[int, int], ...]:
    return tuple((span.start, span.end) for span in node.facts.spans)


def joined(capacities: list[int], layers: int = LAYERS) -> list[Peer]:
    """Nodes that join one after another with `--layers auto`."""
    peers: list[Peer] = []
    for index, capacity in enumerate(capacities):
        name = f"n{index:02}"
        chosen = choose_spans(view(*peers), NodeId(name), card(layers=layers), capacity)
        peers.append(peer(name, *((span.start, span.end) for span in chosen), layers=layers, capacity=capacity))
    return peers


def copies(peers: list[Peer], layers: int = LAYERS) -> list[int]:
    return replicas(view(*peers), card(layers=layers))


def paths_exist(peers: list[Peer], layers: int = LAYERS) -> bool:
    return connected([spans_of(each) for each in peers if each.state is PeerState.ALIVE], layers)


def test_the_whole_model_when_it_fits() -> None:
    assert choose_spans(view(), NodeId("n"), card(), 6) == (Span(MODEL, 0, 6),)
    assert choose_spans(view(peer("a", (0, 6)), peer("b", (0, 6))), NodeId("n"), card(), 99) == (Span(MODEL, 0, 6),)
    assert choose_spans(view(), NodeId("n"), card(), 0) == ()


WHOLE_ONLY = msgspec.structs.replace(card(), whole_only="layer 1 is given per_layer_input beside the activations")


def test_a_whole_only_model_is_held_whole_or_not_at_all() -> None:
    assert choose_spans(view(), NodeId("n"), WHOLE_ONLY, 6) == (Span(MODEL, 0, 6),)
    for capacity in range(6):
        assert choose_spans(view(peer("a", (0, 6))), NodeId("n"), WHOLE_ONLY, capacity) == ()


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6))
def test_no_move_takes_a_part_of_a_whole_only_model(nodes: list[tuple[int, bool]]) -> None:
    peers = []
    for number, (capacity, holds) in enumerate(nodes):
        spans = [(0, 6)] if holds and capacity >= 6 else []
        one = peer(f"n{number}", *spans, capacity=capacity)
        peers.append(dataclasses.replace(one, facts=msgspec.structs.replace(one.facts, models=(WHOLE_ONLY,))))
    move = next_move(view(*peers), MODEL)
    holders = sum(bool(each.facts.spans) for each in peers)
    roomy = sum(capacity >= 6 for capacity, _ in nodes)
    assert (move is not None) == (holders < 2 and roomy > holders)
    assert move is None or move.take == (Span(MODEL, 0, 6),)


def test_uncovered_layers_come_before_second_copies() -> None:
    assert choose_spans(view(peer("a", (0, 4))), NodeId("n"), card(), 2) == (Span(MODEL, 4, 6),)
    assert choose_spans(view(peer("a", (0, 4))), NodeId("n"), card(), 4) == (Span(MODEL, 2, 6),)


def test_two_pieces_only_where_one_would_leave_a_layer_with_less_copies() -> None:
    crossed = view(peer("a", (0, 4)), peer("b", (2, 6)))
    assert choose_spans(crossed, NodeId("n"), card(), 4) == (Span(MODEL, 0, 2), Span(MODEL, 4, 6))


def test_a_draining_dead_or_different_copy_does_not_count() -> None:
    gone = [peer("a", (3, 6), draining=True), peer("b", (3, 6), state=PeerState.DEAD), peer("c", (3, 6), weights="w0")]
    for name in "nopqrstu":
        assert choose_spans(view(peer("d", (0, 3)), *gone), NodeId(name), card(), 3) == (Span(MODEL, 3, 6),)


def test_nodes_that_start_together_settle_by_reading_each_others_intent() -> None:
    names = ["n1", "n2", "n3", "n4"]
    intents: dict[str, tuple[Span, ...]] = dict.fromkeys(names, ())
    for _ in range(len(names) + 1):  # gossip rounds: every node sees what the others intended a round ago
        seen = View(
            NodeId("x"),
            {
                NodeId(name): Peer(NodeId(name), name, ("h", 1), facts=Facts(intends=intents[name], models=(card(),)))
                for name in names
            },
        )
        intents = {name: choose_spans(seen, NodeId(name), card(), 3) for name in names}
    held = [peer(name, *((span.start, span.end) for span in spans)) for name, spans in intents.items()]
    assert copies(held) == [2] * LAYERS


CAPACITIES = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(capacities=CAPACITIES, layers=st.integers(1, 9))
def test_nodes_joining_in_turn_hold_every_layer_twice_if_memory_allows(capacities: list[int], layers: int) -> None:
    peers = joined(capacities, layers)
    memory = sum(min(capacity, layers) for capacity in capacities)
    assert min(copies(peers, layers)) >= min(2, memory // layers)
    for each, capacity in zip(peers, capacities):
        assert sum(end - start for start, end in spans_of(each)) == min(capacity, layers)
    if memory >= layers:
        assert paths_exist(peers, layers)


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    capacity=st.integers(1, 7),
    edges=st.sets(st.integers(0, 7)),
)
def test_the_windows_are_the_best_of_all_sets_of_layers(counts: list[int], capacity: int, edges: set[int]) -> None:
    def rank(chosen: tuple[int, ...]) -> tuple[int, ...]:
        """Layers won per level of copies, the fewest first; then fewer pieces; then scarcer layers beyond those wanted."""
        pieces = sum(1 for layer in chosen if layer - 1 not in chosen)
        levels = tuple(sum(1 for layer in chosen if counts[layer] == level) for level in range(2))
        return (*levels, -pieces, -sum(max(0, counts[layer] - 2) for layer in chosen))

    size = min(capacity, len(counts))
    best = max(rank(chosen) for chosen in combinations(range(len(counts)), size))
    windows = best_windows(counts, capacity, 2, NodeId("n"), edges)
    chosen = tuple(layer for start, end in windows for layer in range(start, end))
    assert rank(chosen) == best
    assert all(first[1] < second[0] for first, second in pairwise(windows))


def changed(peers: list[Peer], move: PlacementMove) -> tuple[list[Peer], list[Peer]]:
    """The mesh while the move is under way (dropped first, not yet loaded), and after it."""
    held = {each.id: set(each.facts.spans) for each in peers}
    held[move.node] -= set(move.drop_first)
    during = [_with(each, held[each.id]) for each in peers]
    held[move.node] = (held[move.node] | set(move.take)) - set(move.drop_after)
    return during, [_with(each, held[each.id]) for each in peers]


def _with(node: Peer, spans: set[Span]) -> Peer:
    capacity = node.facts.capacity.get(MODEL)
    windows = sorted((span.start, span.end) for span in spans)
    return peer(node.id, *windows, state=node.state, layers=node.facts.models[0].layers, capacity=capacity)


def killed(peers: list[Peer], dead: int) -> list[Peer]:
    return [
        peer(each.id, *spans_of(each), state=PeerState.DEAD, capacity=each.facts.capacity.get(MODEL)) if index == dead else each
        for index, each in enumerate(peers)
    ]


def test_a_node_with_spare_memory_loads_the_layers_of_a_dead_node() -> None:
    peers = [peer("a", (0, 6)), peer("b", (0, 3), capacity=6), peer("c", (3, 6), state=PeerState.DEAD)]
    move = next_move(view(*peers), MODEL)
    assert move is not None
    assert (move.node, move.drop_first, move.drop_after) == ("b", (), ())
    assert move.take == (Span(MODEL, 3, 6),)


def test_without_spare_memory_only_layers_that_others_serve_are_dropped_first() -> None:
    peers = [peer(name, (0, 3), capacity=3) for name in "abc"]
    peers += [peer("d", (3, 6), capacity=3), peer("e", (3, 6), state=PeerState.DEAD)]
    move = next_move(view(*peers), MODEL)
    assert move is not None
    assert move.node in {"a", "b", "c"}
    assert (move.drop_first, move.take) == ((Span(MODEL, 0, 3),), (Span(MODEL, 3, 6),))


def test_pinned_nodes_never_move() -> None:
    peers = [peer(name, (0, 3)) for name in "abc"] + [peer("d", (3, 6))]
    assert next_move(view(*peers), MODEL) is None
    move = next_move(view(*peers), MODEL, {NodeId("b"): 0})  # a capacity below what the node holds counts as what it holds
    assert move is not None and move.node == "b"


def test_a_node_that_drops_a_span_loads_as_much_again() -> None:
    peers = [peer(name, (0, 5), capacity=5) for name in "abc"] + [peer("d", (5, 6), capacity=1)]
    move = next_move(view(*peers), MODEL)
    assert move is not None
    assert (move.drop_first, move.take) == ((Span(MODEL, 0, 5),), (Span(MODEL, 1, 6),))


def test_the_only_copy_of_a_served_layer_is_never_dropped() -> None:
    fixed = peer("c", (1, 4), state=PeerState.SUSPECT)
    peers = [
        peer("a", (0, 4), capacity=4),
        peer("b", (1, 6), capacity=5),
        fixed,
    ]  # `a` could hold 0:1 and 4:6, but layer 0 would be gone for a while
    assert next_move(view(*peers), MODEL) is None
    roomy = [peer("a", (0, 4), capacity=6), peer("b", (1, 6), capacity=5), fixed]
    move = next_move(view(*roomy), MODEL)
    assert move is not None and (move.node, move.drop_first, move.take) == ("a", (), (Span(MODEL, 4, 6),))


def test_nodes_with_spare_room_move_before_those_that_must_drop_layers() -> None:
    for tight, roomy in (("b", "c"), ("c", "b"), ("x", "y"), ("y", "x"), ("1", "2"), ("2", "1")):
        peers = [peer("a", (0, 6), capacity=6), peer(tight, (0, 3), capacity=3), peer(roomy, (0, 3), capacity=6)]
        move = next_move(view(*peers), MODEL)
        assert move is not None and move.node == roomy


def test_windows_begin_and_end_where_others_do() -> None:
    for name in "nopqrstu":
        assert choose_spans(view(peer("a", (0, 2)), peer("b", (2, 6))), NodeId(name), card(), 2) == (Span(MODEL, 0, 2),)
        assert choose_spans(view(peer("a", (0, 4)), peer("b", (4, 6))), NodeId(name), card(), 2) == (Span(MODEL, 4, 6),)


def test_the_survivor_of_two_nodes_loads_the_missing_layers() -> None:
    peers = [peer("a", (0, 4), capacity=6), peer("b", (2, 6), state=PeerState.DEAD)]
    move = next_move(view(*peers), MODEL)
    assert move is not None
    assert (move.node, move.take) == ("a", (Span(MODEL, 0, 6),))


def test_nothing_moves_while_the_view_is_frozen() -> None:
    peers = [peer("a", (0, 3), capacity=6), peer("b", (3, 6), state=PeerState.DEAD), peer("c", (3, 6), state=PeerState.SUSPECT)]
    assert next_move(view(*peers), MODEL) is not None
    assert next_move(dataclasses.replace(view(*peers), frozen=True), MODEL) is None


def test_nothing_moves_during_a_load_or_without_a_shortfall() -> None:
    short = [peer("a", (0, 6)), peer("b", (0, 3), capacity=6)]
    assert next_move(view(*short), MODEL) is not None
    loading = Peer(NodeId("z"), "z", ("h", 1), facts=Facts(models=(card(),), intends=(Span(MODEL, 0, 6),)))
    assert next_move(view(*short, loading), MODEL) is None
    assert next_move(view(peer("a", (0, 6)), peer("b", (0, 6)), peer("c", capacity=6)), MODEL) is None
    assert next_move(view(), MODEL) is None


def test_suspect_nodes_do_not_move_and_their_copies_still_count() -> None:
    peers = [peer("a", (0, 6)), peer("b", (0, 6), state=PeerState.SUSPECT), peer("c", capacity=6)]
    assert next_move(view(*peers), MODEL) is None
    without = [peer("a", (0, 6)), peer("b", (0, 3), state=PeerState.SUSPECT, capacity=6), peer("c", capacity=0)]
    assert next_move(view(*without), MODEL) is None


def standing(peers: list[Peer]) -> tuple[int, int, int]:
    counts = copies(peers)
    return (0 if paths_exist(peers) else 1, counts.count(0), sum(1 for count in counts if count < 2))


LIVE = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda span: span[0] < span[1]), max_size=2),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150)
@given(mesh=LIVE)
def test_moves_end_improve_the_placement_and_keep_the_last_copy(
    mesh: list[tuple[list[tuple[int, int]], int]],
) -> None:
    peers = [
        peer(f"n{index}", *spans, capacity=sum(end - start for start, end in spans) + spare)
        for index, (spans, spare) in enumerate(mesh)
    ]
    capacities: Mapping[str, int] = {each.id: each.facts.capacity[MODEL] for each in peers}
    for _ in range(60):
        move = next_move(view(*peers), MODEL)
        assert move == next_move(view(*reversed(peers), me="other"), MODEL)  # the same on every node
        if move is None:
            break
        served = paths_exist(peers)
        during, after = changed(peers, move)
        assert standing(after) < standing(peers)
        if served:
            assert all(now > 0 for was, now in zip(copies(peers), copies(during)) if was > 0)
        for mesh_then in (during, after):
            held = {each.id: sum(end - start for start, end in spans_of(each)) for each in mesh_then}
            assert all(held[node] <= capacities[node] for node in held)
        peers = after
    else:
        raise AssertionError("moves without end")


@settings(max_examples=60)
@given(capacities=st.lists(st.integers(LAYERS, 9), min_size=3, max_size=6), dead=st.integers(0, 5))
def test_after_a_death_whole_nodes_with_room_restore_two_copies(capacities: list[int], dead: int) -> None:
    peers = [peer(f"n{index}", (0, 3) if index % 2 else (3, 6), capacity=capacity) for index, capacity in enumerate(capacities)]
    peers = killed(peers, dead % len(peers))
    for _ in range(20):
        move = next_move(view(*peers), MODEL)
        if move is None:
            break
        peers = changed(peers, move)[1]
    assert min(copies(peers)) >= 2
    assert paths_exist(peers)
