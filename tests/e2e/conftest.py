"""One fork server for all end-to-end tests: a node's start then costs a fifth of the CPU time."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from cli.local_mesh import LocalMesh
from tests.e2e.forked_nodes import ForkServer


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """Every `LocalMesh` of these tests forks its nodes; where the system has no pidfd, they are started as usual."""
    if sys.platform != "linux":
        yield
        return
    server, usual = ForkServer(), LocalMesh.start_process
    LocalMesh.start_process = staticmethod(server.popen)  # type: ignore[assignment]
    try:
        yield
    finally:
        LocalMesh.start_process = usual
        server.close()
