"""Real processes on loopback, some of them killed: every client gets the tokens of an undisturbed run."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cli.local_mesh import LocalMesh, LocalNode
from tests.e2e.meshes import SPLIT, answer, get, idle, new_tokens, ready, start_split, stream, tokens_of, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def read_and_disturb(
    entry: LocalNode, disturb: Callable[[str], None] | None, after_tokens: int, **changes: Any
) -> tuple[list[int], list[int], dict[str, Any]]:
    """Streams from `entry` and calls `disturb(stream id)` once so many tokens have come."""
    tokens, seqs, last = [], [], {}
    with stream(entry, **changes) as (stream_id, chunks):
        for chunk in chunks:
            tokens += new_tokens(chunk)
            seqs.append(chunk["mesh"]["seq"])
            last = chunk
            if disturb is not None and len(tokens) >= after_tokens:
                disturb(stream_id)
                disturb = None
    assert disturb is None, "the answer was over before it could be disturbed"
    return tokens, seqs, last


@pytest.fixture(scope="module")
def whole_mesh() -> Iterator[LocalMesh]:
    with LocalMesh() as mesh:
        start_split(mesh)
        yield mesh


@pytest.fixture
def mesh(whole_mesh: LocalMesh) -> LocalMesh:
    """Three ready nodes, those that the test before has ended started again; the first is the entry and never ends."""
    for name, options in SPLIT.items():
        if not any(node.alive for node in whole_mesh.nodes if node.name == name):
            whole_mesh.start(name, *options)
    ready(living(whole_mesh))
    return whole_mesh


def living(mesh: LocalMesh) -> list[LocalNode]:
    return sorted((node for node in mesh.nodes if node.alive), key=lambda node: node.name)


def a_stage_of(mesh: LocalMesh, stream_id: str) -> LocalNode:
    """A node on the stream's path that is not its entry."""
    entry, *others = living(mesh)
    by_id = {get(node, "/mesh/status").json()["self"]["id"]: node for node in others}
    path = get(entry, f"/mesh/requests/{stream_id}").json()["path"]
    return next(by_id[stage["node"]] for stage in path if stage["node"] in by_id)


def test_a_killed_stage_changes_no_token_and_leaves_nothing_behind(mesh: LocalMesh) -> None:
    entry = living(mesh)[0]
    request = {"max_tokens": 160, "seed": 7, "ignore_eos": True}
    undisturbed = tokens_of(answer(entry, **request))

    tokens, seqs, last = read_and_disturb(entry, lambda stream_id: mesh.kill(a_stage_of(mesh, stream_id)), 20, **request)

    assert tokens == undisturbed
    assert seqs == sorted(seqs) and seqs[-1] == 160
    assert last["mesh"]["attempts"] == 2 and last["mesh"]["numerics"] == "exact"
    idle(living(mesh))


def test_a_restarted_node_is_the_same_member_again(mesh: LocalMesh) -> None:
    entry, victim = living(mesh)[0], living(mesh)[2]
    before = {peer["id"] for peer in get(entry, "/mesh/status").json()["nodes"]}
    mesh.kill(victim)
    mesh.start(victim.name, *SPLIT[victim.name])
    ready(living(mesh))

    assert {peer["id"] for peer in get(entry, "/mesh/status").json()["nodes"]} == before


def test_a_stage_that_is_stopped_and_not_killed_costs_time_but_no_token(mesh: LocalMesh) -> None:
    entry = living(mesh)[0]
    request = {"max_tokens": 160, "seed": 11, "ignore_eos": True}
    undisturbed = tokens_of(answer(entry, **request))
    stopped = []

    def freeze(stream_id: str) -> None:
        stopped.append(a_stage_of(mesh, stream_id))
        mesh.kill(stopped[0], signal.SIGSTOP)

    tokens, _, last = read_and_disturb(entry, freeze, 20, **request)
    assert tokens == undisturbed
    assert last["mesh"]["attempts"] == 2

    mesh.kill(stopped[0], signal.SIGCONT)
    ready(living(mesh))  # it comes back by itself, under the same id
    idle(living(mesh))


def test_a_node_that_is_told_to_stop_ends_in_order_and_the_others_go_on(mesh: LocalMesh) -> None:
    entry, leaving = living(mesh)[0], living(mesh)[2]
    request = {"max_tokens": 60, "seed": 5, "ignore_eos": True}
    undisturbed = tokens_of(answer(entry, **request))

    assert mesh.stop(leaving) == 0
    wait_until(
        lambda: "left" in [peer["state"] for peer in get(entry, "/mesh/status").json()["nodes"]], "the leaving node has left"
    )
    assert tokens_of(answer(entry, **request)) == undisturbed


def test_the_last_node_stops_in_order_too(mesh: LocalMesh) -> None:
    for node in reversed(living(mesh)):
        assert mesh.stop(node) == 0, node.log_tail()
