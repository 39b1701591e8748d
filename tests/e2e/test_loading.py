"""A node that loads says so, and how far it is, on every node that is asked; then it answers."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.local_mesh import LocalMesh, LocalNode
from tests.e2e.meshes import CHAT, get, ready, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_layers_that_a_peer_is_fetching_are_told_with_progress_until_they_serve(tmp_path: Path) -> None:
    with LocalMesh(tmp_path) as mesh:
        a = mesh.start("a", "--layers", "0:3", "--upload", "1MiB")
        wait_until(lambda: get(a, "/mesh/status").json()["nodes"][0]["spans"], "a serves its own layers")
        b = mesh.start("b", "--model", "mesh-demo", "--layers", "3:6")  # fetches them from a, slowly

        def refused(node: LocalNode) -> tuple[httpx.Response, dict[str, Any]] | None:
            answer = httpx.post(node.http + "/v1/chat/completions", json=CHAT, timeout=60)
            told = answer.json().get("error", {})
            return (answer, told) if told.get("code") == "model_loading" else None

        answer, told = wait_until(lambda: refused(a), "a tells that its peer is loading")
        assert answer.status_code == 503 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert 0 <= told["progress"] <= 1 and told["layers"] == [[3, 6]] and told["eta_s"] >= 0
        assert "being loaded by b" in told["message"]
        not_ready = get(a, "/ready")
        assert not_ready.status_code == 503 and not_ready.json()["error"]["code"] == "model_loading"
        wait_until(lambda: get(a, "/mesh/status").json()["models"][0]["loading"]["progress"] > 0, "progress is told")
        seen = get(a, "/mesh/status").json()
        assert [load["start"] for node in seen["nodes"] if node["name"] == "b" for load in node["loading"]] == [3]

        ready([a, b])
        assert httpx.post(a.http + "/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        assert get(b, "/mesh/status").json()["models"][0]["loading"] is None
        assert re.search(r"node\.loading .*layers=\['3:6'\]", b.log.read_text())
        wait_until(lambda: re.search(r"node\.loaded .*seconds=", b.log.read_text()), "the log tells of it at the next look")
