"""`mesh demo` as a newcomer runs it: its answers are sentences of the documents, and nothing is left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_each_node_quotes_the_documents_and_the_killed_answer_comes_whole(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    command = [sys.executable, "-m", "cli", "demo", "--logs", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    asked = re.split(r"\d+\. A question to ", ran.stdout)[1:]
    quoted = {part.split(":")[0] for part in asked if "there word for word" in part}
    assert quoted == {"ada", "bob", "cyd"}, ran.stdout
    assert "Token for token the same answer" in ran.stdout
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", ran.stdout)]
    assert len(pids) == 3 and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
