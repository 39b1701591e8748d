"""What the end-to-end tests share: asking nodes over HTTP, and waiting for conditions instead of sleeping."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from cli.local_mesh import LocalMesh, LocalNode

# Six layers, three nodes: every path crosses two of them, every layer is held twice.
SPLIT = {"a": ("--layers", "0:4"), "b": ("--layers", "2:6"), "c": ("--layers", "0:2,4:6")}
CHAT = {
    "model": "mesh-demo",
    "messages": [{"role": "user", "content": "Tell me of the sea."}],
    "temperature": 1.5,  # the default model is sure of its answers: without it, few tokens would tell one run from another
    "return_token_ids": True,
}


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Looks every 50 ms; returns what the condition gave."""
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def get(node: LocalNode, path: str) -> httpx.Response:
    return httpx.get(node.http + path, timeout=30)


def ready(nodes: Sequence[LocalNode]) -> None:
    """Until all see each other, serve all their spans and have passed a canary token."""

    def all_ready() -> bool:
        for node in nodes:
            status = get(node, "/mesh/status").json()
            alive = [peer for peer in status["nodes"] if peer["state"] == "alive"]
            if len(alive) != len(nodes) or not all(peer["spans"] for peer in alive) or get(node, "/ready").status_code != 200:
                return False
        return True

    wait_until(all_ready, "every node ready")


def answer(node: LocalNode, **changes: Any) -> dict[str, Any]:
    """A whole chat answer."""
    response = httpx.post(node.http + "/v1/chat/completions", json={**CHAT, **changes}, timeout=120)
    assert response.status_code == 200, response.text
    return dict(response.json())


def tokens_of(whole: dict[str, Any], choice: int = 0) -> list[int]:
    return list(whole["choices"][choice]["token_ids"])


@contextmanager
def stream(node: LocalNode, **changes: Any) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """A streamed chat answer: its id, and its chunks up to [DONE]."""
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", node.http + "/v1/chat/completions", json={**CHAT, "stream": True, **changes}) as response,
    ):
        assert response.status_code == 200, response.read()
        yield response.headers["x-mesh-stream"], _chunks(response)


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            yield chunk
    raise AssertionError("the stream ended without [DONE]")


def new_tokens(chunk: dict[str, Any]) -> list[int]:
    return [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]


def idle(nodes: Sequence[LocalNode]) -> None:
    """Until no node computes or holds anything: nothing leaked."""

    def all_idle() -> bool:
        loads = [peer["load"] for node in nodes for peer in get(node, "/mesh/status").json()["nodes"] if peer["state"] == "alive"]
        return all(load["running"] == load["waiting"] == load["kv_blocks_used"] == 0 for load in loads)

    wait_until(all_idle, "every node idle")


def start_split(mesh: LocalMesh) -> list[LocalNode]:
    nodes = mesh.start_all(SPLIT)
    ready(nodes)
    return nodes
