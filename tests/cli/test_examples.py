"""The examples run as they are, against a fake mesh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.fake_mesh import fake_mesh, texts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("example", "words", "shown"),
    [
        ("talk.py", ("hello",), [texts(12), "12 tokens over 1 stages, 1 attempts"]),
        ("documents.py", ("{folder}", "why?"), ["added  notes/a.md", "0.500  a.md", "whole"]),
        ("many_at_once.py", (), ["What is gossip? whole", "What is a tombstone? whole"]),
        ("official_client.py", (), ["whole"]),
    ],
)
def test_an_example_shows_what_it_says(tmp_path: Path, example: str, words: tuple[str, ...], shown: list[str]) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.md").write_text("first")
    with fake_mesh(2, cut_after=[5]) as mesh:
        environment = {**os.environ, "MESH_NODE": mesh.url(0), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "examples" / example), *(word.format(folder=folder) for word in words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for part in shown:
        assert part in done.stdout


def test_talk_says_why_when_its_answer_is_lost() -> None:
    with fake_mesh(2, cut_after=[5], can_resume=False) as mesh:
        environment = {**os.environ, "MESH_NODE": mesh.url(0), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "examples" / "talk.py"), "hello"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == texts(5)
    assert "broke after 5 tokens" in done.stderr and "ask again" in done.stderr and "Traceback" not in done.stderr


def test_every_example_is_tested() -> None:
    tested = {"talk.py", "documents.py", "many_at_once.py", "official_client.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == tested
