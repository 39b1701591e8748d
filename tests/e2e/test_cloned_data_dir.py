"""A copied data directory: the copy ends with the reason, the node that it was copied from does not notice."""

import shutil
from functools import partial
from pathlib import Path

import httpx
import pytest

from cli.local_mesh import LocalMesh, LocalNode
from tests.e2e.meshes import answer, get, ready, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def id_of(node: LocalNode) -> str:
    return str(get(node, "/mesh/status").json()["self"]["id"])


def doctor_says(node: LocalNode) -> str:
    return " ".join(finding["what"] for finding in get(node, "/mesh/doctor").json()["findings"])


def names(node: LocalNode, address: str) -> bool:
    return address in doctor_says(node)


def copy_of(mesh: LocalMesh, node: LocalNode, name: str) -> None:
    """Its data directory under another name, as a careless hand copies it."""
    shutil.copytree(node.data_dir, mesh.folder / name)
    (mesh.folder / name / "lock").unlink()


def test_a_copy_ends_before_it_disturbs_anybody_and_is_a_node_of_its_own_when_asked_to(tmp_path: Path) -> None:
    with LocalMesh(tmp_path) as mesh:
        a, b = mesh.start("a", "--layers", "0:3"), mesh.start("b", "--layers", "3:6")
        ready([a, b])
        copy_of(mesh, b, "c")
        c = mesh.launch("c", "--layers", "3:6")
        assert c.process.wait(60) == 1
        said = c.log_tail().splitlines()[-1]
        assert id_of(b) in said and f"b at {b.gossip}" in said and "--new-identity" in said
        assert not c.http, "it never announced itself"

        assert "restarted=True" not in a.log.read_text(), "nobody took the copy for the node"
        assert answer(a, max_tokens=20)["mesh"]["attempts"] == 1
        for node in (a, b):
            wait_until(partial(names, node, b.gossip), "doctor names the node")
            assert "c at 127.0.0.1:" in doctor_says(node) and id_of(b) in doctor_says(node)

        c = mesh.start("c", "--layers", "3:6", "--new-identity")
        ready([a, b, c])
        assert len({id_of(node) for node in (a, b, c)}) == 3
        mesh.kill(c)
        c = mesh.start("c", "--layers", "3:6")  # it keeps the new one
        ready([a, b, c])
        assert len({id_of(node) for node in (a, b, c)}) == 3


def test_of_a_node_and_its_copy_that_meet_later_the_younger_ends_and_the_other_stays(tmp_path: Path) -> None:
    with LocalMesh(tmp_path) as mesh:
        a, b = mesh.start("a", "--layers", "0:3"), mesh.start("b", "--layers", "3:6")
        ready([a, b])
        copy_of(mesh, b, "c")
        (mesh.folder / "c" / "peers.json").unlink(missing_ok=True)
        c = mesh.start("c", "--layers", "3:6", join=[])  # alone: nothing tells it of the other
        assert id_of(c) == id_of(b)
        d = mesh.start("d", "--layers", "none", join=[a, c])  # through which the two meshes become one
        assert c.process.wait(60) == 1
        said = c.log_tail().splitlines()[-1]
        assert f"b at {b.gossip}" in said and "--new-identity" in said
        identity = id_of(b)

        def settled() -> bool:
            seen = [peer for peer in get(a, "/mesh/status").json()["nodes"] if peer["id"] == identity]
            return [(peer["state"], peer["gossip"]) for peer in seen] == [("alive", b.gossip)]

        wait_until(settled, "a has the older one again")
        wait_until(lambda: get(a, "/ready").status_code == 200, "and a path over it")
        restarts = a.log.read_text().count("restarted=True")
        assert restarts <= 2, "taken for the other once, and back"
        for _ in range(5):
            assert httpx.get(d.http + "/health", timeout=30).status_code == 200
            assert answer(a, max_tokens=20)["mesh"]["attempts"] == 1
        assert a.log.read_text().count("restarted=True") == restarts, "no flapping"
