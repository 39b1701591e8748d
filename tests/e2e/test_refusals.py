"""What cannot start says why and what would work; nothing that is running notices."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cli.local_mesh import LocalMesh
from tests.e2e.meshes import answer, get, wait_until
from tests.engine.checkpoints import make_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def up(tmp_path: Path, *options: str) -> tuple[int, str]:
    """Runs `mesh up` until it ends by itself: exit code and stderr."""
    command = [sys.executable, "-m", "cli", "up", "--data-dir", str(tmp_path / "data"), *options]
    if "--bind" not in options:
        command += ["--bind", "127.0.0.1:0"]
    if "--http" not in options:
        command += ["--http", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout == "", "nothing is announced that does not run"
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_a_model_that_cannot_be_served_is_refused_with_the_reason(tmp_path: Path) -> None:
    code, said = up(tmp_path, "--model", str(tmp_path / "missing"))
    assert code == 1 and "there is no directory" in said and "save_pretrained" in said

    empty = tmp_path / "empty"
    empty.mkdir()
    code, said = up(tmp_path, "--model", str(empty))
    assert code == 1 and "config.json" in said

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}')
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    code, said = up(tmp_path, "--model", str(pickled))
    assert code == 1 and "safetensors" in said


def test_a_checkpoint_with_a_missing_file_is_refused_before_anything_is_announced(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", shard="300KB")
    (directory / "model-00002-of-00004.safetensors").unlink()
    code, said = up(tmp_path, "--model", str(directory))
    told = "model-00002-of-00004.safetensors is missing from llama, and model.safetensors.index.json names it; download it again"
    assert code == 1 and said.splitlines()[-1] == f"mesh: {told}"


def test_layers_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    code, said = up(tmp_path, "--layers", "4:9")
    assert code == 1 and "0:6" in said
    code, said = up(tmp_path, "--layers", "4:2")
    assert code in (1, 2) and "A:B" in said


@pytest.mark.parametrize("option", ["--bind", "--http"])
def test_a_port_in_use_is_named(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = up(tmp_path, option, f"127.0.0.1:{taken.getsockname()[1]}")
    assert code == 1 and "in use" in said and option in said


def test_an_address_beyond_loopback_needs_a_key(tmp_path: Path) -> None:
    code, said = up(tmp_path, "--bind", "0.0.0.0:0")
    assert code == 1 and "mesh key new" in said


def test_a_seed_that_is_no_mesh_node_is_named_so(tmp_path: Path) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code, said = up(tmp_path, "--join", f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert code == 1 and "not a mesh node" in said


def test_a_seed_that_is_not_up_yet_is_joined_as_soon_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        late = f"127.0.0.1:{free.getsockname()[1]}"
    with LocalMesh() as mesh:
        early = mesh.start("early", "--layers", "none", "--join", late)
        mesh.start("late", "--layers", "none", "--bind", late, join=[])

        def together() -> bool:
            return len([n for n in get(early, "/mesh/status").json()["nodes"] if n["state"] == "alive"]) == 2

        wait_until(together, "both in one mesh")


def test_keys_let_nodes_in_and_keep_others_out(tmp_path: Path) -> None:
    keys = [tmp_path / "one.key", tmp_path / "other.key"]
    for key in keys:
        subprocess.run([sys.executable, "-m", "cli", "key", "new", str(key)], check=True, capture_output=True)
    with LocalMesh() as mesh:
        first = mesh.start("a", "--key-file", str(keys[0]))
        second = mesh.start("b", "--key-file", str(keys[0]), "--layers", "none")
        wait_until(lambda: get(second, "/ready").status_code == 200, "a path over TLS")
        assert answer(second, max_tokens=4)["mesh"]["path"][0]["node"] == get(first, "/mesh/status").json()["self"]["id"]

        for options in (["--key-file", str(keys[1])], []):
            code, said = up(tmp_path, "--join", first.gossip, *options)
            assert code == 1 and "key" in said
        assert len(get(first, "/mesh/status").json()["nodes"]) == 2
        assert answer(second, max_tokens=4)["choices"]
