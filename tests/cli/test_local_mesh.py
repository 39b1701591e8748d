"""Real processes under `LocalMesh`: small stand-ins for nodes, so that starting and ending them is what is tested."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.local_mesh import LocalMesh, NodeFailed

ROOT = Path(__file__).parents[2]

# Takes the options of `mesh up`, announces itself, and waits; what its name says goes wrong.
STAND_IN = """
import signal, sys, time
from node.host import parent_watch
words = sys.argv
option = lambda name: words[words.index(name) + 1]
parent_watch.exit_with_parent(int(option("--exit-with-parent")))
name = option("--name")
joined = [words[index + 1] for index, word in enumerate(words) if word == "--join"]
print("starting", name, "joining", *joined, file=sys.stderr, flush=True)
if name == "broken":
    sys.exit("no such model")
if name == "chatty":
    print("something else first")
signal.signal(signal.SIGTERM, signal.SIG_IGN if name == "stubborn" else lambda *_: sys.exit(0))
if name != "silent":
    print(f"mesh node {name} up: http://127.0.0.1:1{len(joined)} gossip 127.0.0.1:2{len(joined)}", flush=True)
time.sleep(60)
"""


class StandIns(LocalMesh):
    """Starts the stand-in where a node would be started."""

    command = (sys.executable, "-c", STAND_IN)


def gone(pid: int) -> bool:
    """Whether no process has this id; one that is dead but not yet waited for counts as gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def until_gone(pid: int, timeout_s: float = 10.0) -> bool:
    """Waits for the end of a process that is not our child; whether it came."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], timeout_s)[0])
    finally:
        os.close(watched)


def test_nodes_announce_themselves_and_later_ones_join_the_first() -> None:
    with StandIns() as mesh:
        first, second, third = mesh.start_all({"a": (), "chatty": (), "c": ("--layers", "0:2")})
        assert (first.http, first.gossip) == ("http://127.0.0.1:10", "127.0.0.1:20")
        assert second.http == third.http == "http://127.0.0.1:11"
        assert f"joining {first.gossip}" in third.log.read_text()
        assert all(node.alive for node in mesh.nodes)
        folder = mesh.folder
    assert all(gone(node.pid) for node in mesh.nodes)
    assert not folder.exists()


def test_an_error_in_the_middle_leaves_no_process_behind() -> None:
    with pytest.raises(RuntimeError, match="in the middle"), StandIns() as mesh:
        node = mesh.start("a")
        raise RuntimeError("in the middle")
    assert gone(node.pid)


def test_a_node_that_ends_early_is_told_with_the_end_of_its_log() -> None:
    with pytest.raises(NodeFailed, match=r"broken ended with exit code 1(.|\n)*no such model"), StandIns() as mesh:
        mesh.start("broken")


def test_a_node_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(NodeFailed, match="silent did not announce itself within"), StandIns(tmp_path) as mesh:
        mesh.start("silent", timeout_s=0.5)
    assert all(gone(node.pid) for node in mesh.nodes)
    assert (tmp_path / "silent.log").exists()  # a folder that was given is kept


def test_a_killed_node_is_gone_at_once_and_may_be_started_again_on_its_data() -> None:
    with StandIns() as mesh:
        node = mesh.start("a")
        mesh.kill(node)
        assert not node.alive
        again = mesh.start("a", join=[])
        assert again.data_dir == node.data_dir
        assert again.pid != node.pid


def test_a_node_is_stopped_the_regular_way_and_killed_if_it_will_not() -> None:
    with StandIns() as mesh:
        assert mesh.stop(mesh.start("a")) == 0
        stubborn = mesh.start("stubborn")
        assert mesh.stop(stubborn, timeout_s=0.2) == -signal.SIGKILL


def test_no_node_outlives_the_process_that_started_it() -> None:
    starter = (
        "import os, signal\n"
        "from tests.cli.test_local_mesh import StandIns\n"
        "mesh = StandIns()\n"
        "print(mesh.folder, *(mesh.start(name).pid for name in 'ab'), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", starter], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder, *pids = done.stdout.split()
    try:
        assert len(pids) == 2
        assert all(until_gone(int(pid)) for pid in pids)
    finally:
        shutil.rmtree(folder)
