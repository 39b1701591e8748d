"""Tables fit a terminal where they can, and never break what a person copies."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from cli.tables import TableLine, table_lines, wrapped
from tests.cli.fake_mesh import FakeMesh, fake_mesh

ROOT = Path(__file__).parents[2]
NAMES = ("NODE", "STATE", "HTTP", "RUNNING", "ID")
ROWS = [
    ("ada", "alive", "http://127.0.0.1:46285", 0, "c34505b758d0e254"),
    ("bob", "alive, loading 43%", "http://127.0.0.1:8001", 12, "0123456789abcdef"),
]


def shown(width: int | None, rows: Sequence[tuple[object, ...]] = ROWS) -> list[str]:
    return [line.text for line in table_lines(NAMES, rows, width, wraps=("STATE",))]


def test_what_fits_is_one_table_with_numbers_on_the_right() -> None:
    assert (
        shown(80)
        == shown(None)
        == [
            "NODE  STATE               HTTP                    RUNNING  ID",
            "ada   alive               http://127.0.0.1:46285        0  c34505b758d0e254",
            "bob   alive, loading 43%  http://127.0.0.1:8001        12  0123456789abcdef",
        ]
    )


def test_words_wrap_first() -> None:
    assert shown(74) == [
        "NODE  STATE              HTTP                    RUNNING  ID",
        "ada   alive              http://127.0.0.1:46285        0  c34505b758d0e254",
        "bob   alive, loading     http://127.0.0.1:8001        12  0123456789abcdef",
        "      43%",
    ]


def test_columns_that_do_not_fit_stand_below_with_the_key_again() -> None:
    assert shown(50) == [
        "NODE  STATE               HTTP",
        "ada   alive               http://127.0.0.1:46285",
        "bob   alive, loading 43%  http://127.0.0.1:8001",
        "",
        "NODE  RUNNING  ID",
        "ada         0  c34505b758d0e254",
        "bob        12  0123456789abcdef",
    ]


def test_where_one_cell_is_wider_than_the_terminal_each_row_has_lines_of_its_own() -> None:
    assert shown(24, ROWS[:1]) == [
        "ada",
        "  STATE    alive",
        "  HTTP     http://127.0.0.1:46285",
        "  RUNNING  0",
        "  ID       c34505b758d0e254",
    ]


def test_wide_letters_count_as_two() -> None:
    lines = table_lines(("A", "B"), [("語", "x"), ("ab", "y")], 80)
    assert [line.text for line in lines[1:]] == ["語  x", "ab  y"]
    assert lines[0] == TableLine("A   B", is_head=True)


cells = st.text("abc:/.-", min_size=1, max_size=30)
words = st.lists(cells, min_size=1, max_size=5).map(" ".join)


@given(st.lists(st.tuples(cells, words, cells, cells), min_size=1, max_size=4), st.integers(20, 100), st.integers(1, 2))
def test_no_cell_is_broken_and_no_line_too_wide_but_for_one_cell(
    rows: list[tuple[str, str, str, str]], width: int, keys: int
) -> None:
    lines = [line.text for line in table_lines(("K", "WORDS", "URL", "ID"), rows, width, keys=keys, wraps=("WORDS",))]
    text = "\n".join(lines)
    for key, said, url, id in rows:
        assert key in text and url in text and id in text
        assert all(word in text for word in said.split())
    too_wide = [line for line in lines if cell_len(line) > width]
    assert not too_wide or all(line.startswith("  ") or line in {row[0] for row in rows} for line in too_wide)


def test_a_paragraph_wraps_between_words_alone() -> None:
    url = "http://a-long-name.example.org:8000/v1/models"
    assert wrapped(f"see {url} and wait", 20, "  ") == ["see", f"  {url}", "  and wait"]
    assert wrapped("one two", None) == ["one two"] and wrapped("", 10) == [""]
    assert wrapped("  deep text here", 10, "    ") == ["  deep", "    text", "    here"]


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    with fake_mesh(3) as mesh:
        mesh.stores["handbook"] = ["file-1"]
        mesh.files["file-1"] = {"id": "file-1", "filename": "docs/decisions/0004-paths-are-planned-at-the-entry.md", "bytes": 9}
        yield mesh


def in_terminal(columns: int, *words: str) -> list[str]:
    """What `mesh WORDS` shows on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "MESH_NODE")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "cli", *words], stdout=theirs, stdin=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # as Linux tells that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    process.wait()
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("command", ["status", "nodes", "models", "docs list --store handbook", "why req-1"])
def test_on_a_terminal_no_line_is_wider_and_no_id_or_url_broken(mesh: FakeMesh, command: str, columns: int) -> None:
    lines = in_terminal(columns, *command.split(), "--node", mesh.url(0))
    assert lines and all(len(line) <= columns for line in lines), lines
    text = "\n".join(lines)
    wanted = {
        "status": [mesh.url(0), mesh.url(1), mesh.url(2), f"{1:016x}", "127.0.0.1:7946"],
        "nodes": [mesh.url(0), mesh.url(1), mesh.url(2), f"{2:016x}"],
        "models": ["tiny"],
        "docs list --store handbook": ["docs/decisions/0004-paths-are-planned-at-the-entry.md", "file-1"],
        "why req-1": ["chatcmpl-1", "n0 [0:6]"],
    }[command]
    for each in wanted:
        assert each in text, f"{each} in {text}"
