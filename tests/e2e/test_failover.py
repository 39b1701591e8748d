"""Real processes on loopback, some of them killed: every client gets the tokens of an undisturbed run."""

import signal

import pytest

from cli.local_mesh import LocalMesh
from tests.e2e.meshes import answer, get, idle, new_tokens, ready, start_split, stream, tokens_of, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def read_and_disturb(entry, disturb, after_tokens, **changes):
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


def test_a_killed_stage_changes_no_token_and_leaves_nothing_behind():
    with LocalMesh() as mesh:
        nodes = start_split(mesh)
        entry = nodes[0]
        by_id = {get(node, "/mesh/status").json()["self"]["id"]: node for node in nodes}
        request = {"max_tokens": 160, "seed": 7, "temperature": 1.0, "ignore_eos": True}
        undisturbed = tokens_of(answer(entry, **request))

        def kill_a_stage(stream_id):
            path = get(entry, f"/mesh/requests/{stream_id}").json()["path"]
            [victim] = [by_id[stage["node"]] for stage in path if by_id[stage["node"]] is not entry][:1]
            mesh.kill(victim)

        tokens, seqs, last = read_and_disturb(entry, kill_a_stage, 20, **request)

        assert tokens == undisturbed
        assert seqs == sorted(seqs) and seqs[-1] == 160
        assert last["mesh"]["attempts"] == 2 and last["mesh"]["numerics"] == "exact"
        idle([node for node in nodes if node.alive])


def test_the_same_seed_gives_the_same_tokens_from_every_node_alone_or_with_others():
    with LocalMesh() as mesh:
        nodes = start_split(mesh)
        alone = [tokens_of(answer(node, max_tokens=40, seed=3)) for node in nodes]
        with stream(nodes[1], max_tokens=200, seed=1, ignore_eos=True) as (_, others):
            next(others)
            beside = tokens_of(answer(nodes[0], max_tokens=40, seed=3))

        assert alone[0] == alone[1] == alone[2] == beside
        assert tokens_of(answer(nodes[0], max_tokens=40, seed=4)) != alone[0]


def test_a_stage_that_is_stopped_and_not_killed_costs_time_but_no_token():
    with LocalMesh() as mesh:
        nodes = start_split(mesh)
        entry = nodes[0]
        by_id = {get(node, "/mesh/status").json()["self"]["id"]: node for node in nodes}
        request = {"max_tokens": 160, "seed": 11, "ignore_eos": True}
        undisturbed = tokens_of(answer(entry, **request))
        stopped = []

        def freeze_a_stage(stream_id):
            path = get(entry, f"/mesh/requests/{stream_id}").json()["path"]
            stopped.extend([by_id[stage["node"]] for stage in path if by_id[stage["node"]] is not entry][:1])
            mesh.kill(stopped[0], signal.SIGSTOP)

        tokens, _, last = read_and_disturb(entry, freeze_a_stage, 20, **request)
        assert tokens == undisturbed
        assert last["mesh"]["attempts"] == 2

        mesh.kill(stopped[0], signal.SIGCONT)
        ready(nodes)  # it comes back by itself, under the same id
        idle(nodes)


def test_a_node_that_is_told_to_stop_ends_in_order_and_the_others_go_on():
    with LocalMesh() as mesh:
        nodes = start_split(mesh)
        entry = nodes[0]
        request = {"max_tokens": 60, "seed": 5, "ignore_eos": True}
        undisturbed = tokens_of(answer(entry, **request))

        assert mesh.stop(nodes[2]) == 0
        wait_until(
            lambda: "left" in [peer["state"] for peer in get(entry, "/mesh/status").json()["nodes"]], "the leaving node has left"
        )
        assert tokens_of(answer(entry, **request)) == undisturbed


def test_a_restarted_node_is_the_same_member_again():
    with LocalMesh() as mesh:
        nodes = start_split(mesh)
        mesh.kill(nodes[2])
        restarted = mesh.start("c", "--layers", "0:2,4:6")
        ready([nodes[0], nodes[1], restarted])

        status = get(nodes[0], "/mesh/status").json()
        assert len(status["nodes"]) == 3


def test_a_client_that_hangs_up_frees_its_work_on_all_stages():
    with LocalMesh() as mesh:
        nodes = start_split(mesh)
        with stream(nodes[0], max_tokens=2000, seed=1, ignore_eos=True) as (_, chunks):
            for _ in range(5):
                next(chunks)
        idle(nodes)
