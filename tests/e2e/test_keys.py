"""The mesh key is changed under load: no node restarts, nothing is refused; and the doctor knows who has the wrong one."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cli.local_mesh import LocalMesh, LocalNode
from mesh.keys.keyring import load_keyring
from tests.e2e.meshes import SPLIT, answer, get, ready, tokens_of, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def mesh_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cli", *arguments], capture_output=True, text=True, timeout=90)


def unread_datagrams(node: LocalNode) -> float:
    lines = [line for line in get(node, "/metrics").text.splitlines() if "datagrams_dropped" in line and "wrong key" in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_a_rotation_under_load_refuses_nothing_and_the_doctor_tells_who_missed_it(tmp_path: Path) -> None:
    keys = {name: tmp_path / f"{name}.key" for name in SPLIT}
    assert mesh_command("key", "new", str(keys["a"])).returncode == 0
    old = keys["a"].read_bytes()
    for name in ("b", "c"):
        keys[name].touch(mode=0o600)
        keys[name].write_bytes(old)
    with LocalMesh() as mesh:
        nodes = mesh.start_all({name: (*options, "--key-file", str(keys[name])) for name, options in SPLIT.items()})
        ready(nodes)
        pids = [node.pid for node in nodes]
        expected = tokens_of(answer(nodes[0], max_tokens=8, seed=1))
        rotated = threading.Event()
        failures, answers = [], []

        def ask(node: LocalNode) -> None:
            while not rotated.is_set():
                try:
                    answers.append(tokens_of(answer(node, max_tokens=8, seed=1)))
                except (AssertionError, OSError) as error:
                    failures.append(repr(error))

        threads = [threading.Thread(target=ask, args=(node,)) for node in nodes]
        for thread in threads:
            thread.start()
        rotation = mesh_command("key", "rotate", "--node", nodes[1].http, "--json")
        rotated.set()
        for thread in threads:
            thread.join()
        assert rotation.returncode == 0, rotation.stderr
        done = json.loads(rotation.stdout)
        assert len(done["nodes"]) == 3 and done["not_saved"] == []
        assert failures == [] and len(answers) >= 3 and all(tokens == expected for tokens in answers)
        assert [node.pid for node in nodes] == pids and all(node.alive for node in nodes)
        rings = {load_keyring(path) for path in keys.values()}
        assert len(rings) == 1 and rings.pop().sealing.name == done["key"]
        ready(nodes)
        assert [unread_datagrams(node) for node in nodes] == [0, 0, 0]
        well = get(nodes[0], "/mesh/doctor").json()["findings"]
        assert [finding for finding in well if finding["about"] in ("keys", "links", "clocks", "nodes")] == []

        missed = tmp_path / "missed.key"
        missed.touch(mode=0o600)
        missed.write_bytes(old)
        late = mesh_command("up", "--data-dir", str(tmp_path / "late"), "--bind", "127.0.0.1:0", "--http", "127.0.0.1:0",
                            "--join", nodes[0].gossip, "--key-file", str(missed), "--layers", "none")  # fmt: skip
        assert late.returncode == 1 and "key" in late.stderr

        def told() -> subprocess.CompletedProcess[str] | None:
            ill = mesh_command("doctor", "--node", nodes[0].http)
            return ill if ill.returncode == 1 and "key file" in ill.stdout else None

        assert wait_until(told, "the doctor tells of the node with the old key").stdout
