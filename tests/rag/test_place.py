from __future__ import annotations

import dataclasses
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mesh.ids import Address, NodeId
from mesh.view import Peer, PeerState, View
from mesh.wire.calls import CallReply, Header
from rag import place
from rag.local import LocalStores
from rag.peers import Peers
from rag.replica import SHARDS

NODES = [NodeId(f"{number:016x}") for number in range(12)]


def view_of(states: dict[NodeId, PeerState]) -> View:
    return View(NODES[0], {node: Peer(node, node, ("127.0.0.1", 1), state=state) for node, state in states.items()})


def test_a_flap_within_the_grace_moves_no_shard() -> None:
    alive = view_of(dict.fromkeys(NODES[:5], PeerState.ALIVE))
    flapping = view_of({**dict.fromkeys(NODES[:5], PeerState.ALIVE), NODES[2]: PeerState.DEAD, NODES[3]: PeerState.SUSPECT})
    assert place.roster(flapping, {NODES[2]: 100.0}, 699.0) == place.roster(alive, {}, 0.0)
    assert NODES[2] not in place.roster(flapping, {NODES[2]: 100.0}, 701.0)


def test_while_the_view_is_frozen_owners_stay_and_newcomers_wait_but_leavers_go(tmp_path: Path) -> None:
    views = [view_of(dict.fromkeys(NODES[:5], PeerState.ALIVE))]
    peers = Peers(NODES[0], LocalStores(NODES[0], tmp_path, "e", 4, lambda: 0.0), lambda: views[-1], no_call, lambda: now_s)
    now_s = 0.0
    assert peers.roster() == NODES[:5]
    lost = dict.fromkeys(NODES[1:4], PeerState.DEAD)
    cut_off = view_of({NODES[0]: PeerState.ALIVE, **lost, NODES[4]: PeerState.LEFT, NODES[5]: PeerState.ALIVE})
    views.append(dataclasses.replace(cut_off, frozen=True))
    assert peers.roster() == NODES[:4]
    now_s = 10 * place.DEAD_GRACE_S
    assert peers.roster() == NODES[:4], "however long it takes"
    views.append(cut_off)
    assert peers.roster() == [NODES[0], NODES[5]]


async def no_call(to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0) -> CallReply:
    raise AssertionError("nobody is called")


def test_a_node_that_left_owns_nothing_at_once() -> None:
    view = view_of({NODES[0]: PeerState.ALIVE, NODES[1]: PeerState.LEFT})
    assert place.roster(view, {}, 0.0) == [NODES[0]]


@given(st.sets(st.sampled_from(NODES), min_size=4), st.integers(0, SHARDS - 1))
def test_the_loss_of_a_node_moves_only_its_own_shards(nodes: set[NodeId], shard: int) -> None:
    before = place.owners("s", shard, nodes)
    for lost in nodes:
        after = place.owners("s", shard, nodes - {lost})
        assert after == before if lost not in before else set(before) - {lost} <= set(after)


def test_stores_spread_over_all_nodes() -> None:
    owned = {node for store in "abcdef" for shard in range(SHARDS) for node in place.owners(store, shard, NODES)}
    assert owned == set(NODES)


CANDIDATES = st.dictionaries(st.integers(0, SHARDS - 1), st.lists(st.sampled_from(NODES), unique=True, max_size=3))


@given(CANDIDATES, st.sampled_from(NODES))
def test_a_cover_asks_for_each_shard_once_and_only_of_a_candidate(candidates: dict[int, list[NodeId]], me: NodeId) -> None:
    plan = place.cover(candidates, me)
    asked = [shard for shards in plan.values() for shard in shards]
    assert sorted(asked) == sorted(shard for shard, nodes in candidates.items() if nodes)
    assert all(node in candidates[shard] for node, shards in plan.items() for shard in shards)
    assert all(me in plan and shard in plan[me] for shard, nodes in candidates.items() if me in nodes)


def test_a_cover_asks_few_nodes() -> None:
    assert place.cover({0: [NODES[1], NODES[2]], 1: [NODES[2], NODES[3]], 2: [NODES[2]]}, NODES[0]) == {NODES[2]: [0, 1, 2]}
