"""The command as a whole: what it imports, what it documents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cli.reference import reference

ROOT = Path(__file__).parents[2]


def test_help_imports_neither_torch_nor_trio_nor_httpx() -> None:
    probe = (
        "import sys\n"
        "from cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'trio', 'httpx', 'transformers', 'numpy', 'starlette', 'cryptography'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_the_module_runs_as_the_script_does() -> None:
    done = subprocess.run([sys.executable, "-m", "cli", "why"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "REQUEST_ID" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_reference_page_is_what_the_commands_say() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert page == reference(), "docs/cli.md is stale; run: make docs"
    assert "--exit-with-parent" not in page
