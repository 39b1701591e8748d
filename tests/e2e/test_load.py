"""Two hundred users on three real nodes: every request is answered, and no node is taken for lost."""

from __future__ import annotations

import httpx
import pytest

from bench import load
from bench.load_client import Plan
from cli.local_mesh import LocalMesh
from tests.e2e.meshes import ready

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_two_hundred_users_are_served_without_a_failure() -> None:
    with LocalMesh() as mesh:
        nodes = mesh.start_all({name: () for name in "abc"})
        ready(nodes)
        seen = load.run_users(Plan(load.urls_of(nodes), users=200, requests=400, max_tokens=8))
        requests = seen["requests"]
        assert [request["error"] for request in requests if request["error"]] == []
        assert all(request["text"] for request in requests)
        for node in nodes:
            metrics = httpx.get(node.http + "/metrics", trust_env=False).text
            assert "mesh_entry_counters_attempts_lost_total 0.0" in metrics
            assert "mesh_entry_queued 0.0" in metrics and "mesh_entry_full_nodes 0.0" in metrics
        assert load.suspects_of(nodes) == 0
