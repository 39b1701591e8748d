"""Chat and plain completions over a real server: what a client sees, and when a generation is left."""

from __future__ import annotations

import trio

from mesh.errors import BadRequest, NoPath, PeerLost, Refused
from mesh.ids import ModelId
from node.requests import Citation, RetrievalReport, TextDelta, TokenLogprob
from tests.http.fake_node import CHAT, HANG, ME, SPLIT, WORDS, FakeNode, finished, saying, started
from tests.http.served import read_all, served

QUESTION = {"model": CHAT, "messages": [{"role": "user", "content": "Say hello"}]}


async def test_a_chat_answer_is_whole_and_tells_how_it_came_about() -> None:
    async with served() as site:
        reply = await site.ask("POST", "/v1/chat/completions", QUESTION, {"x-request-id": "mine-1"})
    assert reply.status == 200
    assert reply.headers["x-request-id"] == "mine-1"
    assert reply.headers["x-mesh-node"] == ME
    body = reply.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "".join(WORDS)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert body["mesh"]["seq"] == 5
    assert body["mesh"]["seed"] == 7
    assert body["mesh"]["numerics"] == "exact"
    assert body["mesh"]["path"][0] == {"node": ME, "start": 0, "end": 2}
    assert reply.headers["x-mesh-stream"] == body["id"]


async def test_a_chat_stream_counts_tokens_and_ends_with_the_path_right_before_done() -> None:
    async with served() as site:
        reply = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "stream": True, "return_token_ids": True})
    events = reply.events()
    assert reply.whole
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert {chunk["id"] for chunk in chunks} == {reply.headers["x-mesh-stream"]}
    assert [chunk["mesh"]["seq"] for chunk in chunks] == [0, 1, 2, 3, 4, 5]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "".join(WORDS)
    assert [len(chunk["choices"][0].get("token_ids", ())) for chunk in chunks] == [0, 1, 1, 1, 1, 1]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert chunks[-1]["mesh"]["attempts"] == 1
    assert all("path" not in chunk["mesh"] for chunk in chunks[:-1])
    assert b"id:" not in reply.body and b"event:" not in reply.body and b"retry:" not in reply.body
