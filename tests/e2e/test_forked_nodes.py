"""A forked node is a process like one that was started in the usual way; where that could differ, none is forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.local_mesh import LocalMesh
from tests.e2e.forked_nodes import ForkedProcess

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="nodes are forked on Linux alone")]


def test_a_forked_node_has_a_session_signals_log_and_exit_codes_of_its_own(tmp_path: Path) -> None:
    with LocalMesh(tmp_path) as mesh:
        killed, stopped = mesh.start("killed", "--layers", "none"), mesh.start("stopped", "--layers", "none")
        assert isinstance(killed.process, ForkedProcess) and killed.pid != stopped.pid
        assert [os.getsid(node.pid) for node in (killed, stopped)] == [killed.pid, stopped.pid]
        mesh.kill(killed)
        assert killed.process.returncode == -signal.SIGKILL and stopped.alive
        assert mesh.stop(stopped) == 0
        assert "node.draining" in stopped.log_tail() and "node.draining" not in killed.log_tail()
        refused = mesh.launch("refused", "--layers", "4:2")
        assert refused.process.wait(60) in (1, 2)
        assert "A:B" in refused.log_tail() and "Traceback" not in refused.log_tail()


def test_a_node_with_an_environment_of_its_own_is_not_forked(tmp_path: Path) -> None:
    """Libraries read theirs while they are loaded."""
    with LocalMesh(tmp_path / "usual") as usual, LocalMesh(tmp_path / "other", environment={"MESH_TESTED": "1"}) as other:
        first = usual.launch("first", "--layers", "none")
        second = other.launch("second", "--layers", "none")
        assert isinstance(first.process, ForkedProcess) and isinstance(second.process, subprocess.Popen)
