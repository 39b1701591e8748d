"""A node without a model's files gets them from its peers, also when one of them is killed on the way."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from cli.local_mesh import LocalMesh
from tests.e2e.meshes import answer, ready, tokens_of, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_a_node_without_files_fetches_its_span_survives_the_death_of_a_source_and_serves_the_same_tokens(tmp_path: Path) -> None:
    with LocalMesh(tmp_path) as mesh:
        a, b = mesh.start_all({"a": ("--upload", "6MiB"), "b": ("--upload", "6MiB")})
        ready([a, b])
        c = mesh.start("c", "--model", "mesh-demo", "--layers", "0:6")
        wait_until(lambda: list((tmp_path / "c").glob("weights/*/layer-*.part")), "the first layers are on their way")
        mesh.kill(a)
        ready([b, c])
        assert "retries=0" not in re.findall(r"weights.fetched.*", c.log.read_text())[-1], "one source died on the way"
        expected = tokens_of(answer(b, seed=3, max_tokens=30))
        mesh.kill(b)
        assert tokens_of(answer(c, seed=3, max_tokens=30)) == expected
        assert answer(c, seed=3, max_tokens=5)["mesh"]["numerics"] == "exact"


def test_a_node_told_to_stop_while_it_fetches_or_before_it_announced_itself_ends_well_and_at_once(tmp_path: Path) -> None:
    with LocalMesh(tmp_path) as mesh:
        a = mesh.start("a", "--upload", "100KiB")
        c = mesh.start("c", "--model", "mesh-demo", "--layers", "0:2")
        wait_until(lambda: list((tmp_path / "c").glob("weights/*/layer-*.part")), "the first layers are on their way")
        began = time.monotonic()
        assert mesh.stop(c) == 0
        assert time.monotonic() - began < 5
        mesh.start_process = subprocess.Popen  # its imports too are a time at which it may be told
        early = mesh.launch("early", "--model", "mesh-demo", join=[a])
        wait_until(lambda: early.log.exists() and "node.starting" in early.log.read_text(), "it has begun")
        assert mesh.stop(early) == 0
