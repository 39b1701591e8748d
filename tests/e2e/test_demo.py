"""`mesh demo`, and the commands of the README, as a newcomer runs them: answers make sense, and nothing is left behind."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli.demo import is_quoted
from cli.local_mesh import LocalMesh
from tests.e2e.meshes import ready
from tools.default_model import talk

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def mesh_command(*words: str, **environment: str) -> str:
    """What it prints; run in the checkout, as the README says."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400", **environment}
    command = [sys.executable, "-m", "cli", *words]
    ran = subprocess.run(command, capture_output=True, text=True, env=given, cwd=ROOT, timeout=380, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_each_node_quotes_the_documents_and_the_killed_answer_comes_whole(tmp_path: Path) -> None:
    shown = mesh_command("demo", "--logs", str(tmp_path))
    asked = re.split(r"\d+\. A question to ", shown)[1:]
    quoted = {part.split(":")[0] for part in asked if "there word for word" in part}
    assert quoted == {"ada", "bob", "cyd"}, shown
    assert "Token for token the same answer" in shown
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", shown)]
    assert len(pids) == 3 and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_the_commands_of_the_readme_are_answered_with_sense(tmp_path: Path) -> None:
    """No temperature is named in them: the model's own settings hold."""
    lines = [line.partition("  #")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    (chat,), (ask,) = ([line for line in lines if line.startswith(f"mesh {name} ")] for name in ("chat", "ask"))
    adds = next(line for line in lines if line.startswith("mesh docs add docs README.md"))
    with LocalMesh(tmp_path) as mesh:
        node = mesh.start("a", "--layers", "0:6")
        ready([node])
        said = mesh_command(*shlex.split(chat)[1:], MESH_NODE=node.http).strip()
        assert said in {answer for _, answer in talk._TURNS}, said
        mesh_command(*shlex.split(adds)[1:], MESH_NODE=node.http)
        told = json.loads(mesh_command(*shlex.split(ask)[1:], "--json", MESH_NODE=node.http))
        quotes = [citation["quote"] for citation in told["citations"]]
        assert any(is_quoted(told["answer"], quote) for quote in quotes), told
