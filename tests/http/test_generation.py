"""Chat and plain completions over a real server: what a client sees, and when a generation is left."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import trio
import trio.testing

from mesh.errors import BadRequest, DeadlineExceeded, ModelLoading, NoPath, PeerLost, Refused
from node.http.app import make_app
from node.requests import ChoiceDone, Citation, Retrieval, RetrievalReport, TextDelta, TokenLogprob
from tests.http.fake_node import CHAT, HANG, ME, SPLIT, WORDS, FakeNode, Step, finished, saying, started
from tests.http.served import ask_in_memory, served

HANG_A_MOMENT = 0.02  # so that what came before is out when the failure comes
QUESTION = {"model": CHAT, "messages": [{"role": "user", "content": "Say hello"}]}

USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 2}}


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
    assert body["usage"] == USAGE
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


async def test_a_stream_with_usage_asked_for_carries_it_and_the_path_in_the_last_chunk() -> None:
    asked = {**QUESTION, "stream": True, "stream_options": {"include_usage": True}}
    async with served() as site:
        events = (await site.ask("POST", "/v1/chat/completions", asked)).events()
    last, before = events[-2], events[-3]
    assert last["choices"] == []
    assert last["usage"] == USAGE
    assert last["mesh"]["path"] and last["mesh"]["seq"] == 5
    assert before["choices"][0]["finish_reason"] == "stop" and before["usage"] is None


async def test_several_choices_are_kept_apart() -> None:
    async with served() as site:
        whole = (await site.ask("POST", "/v1/chat/completions", {**QUESTION, "n": 2})).json()
        events = (await site.ask("POST", "/v1/chat/completions", {**QUESTION, "n": 2, "stream": True})).events()
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["".join(WORDS)] * 2
    texts = ["", ""]
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["".join(WORDS)] * 2
    assert events[-2]["mesh"]["seq"] == whole["usage"]["completion_tokens"] == 10


async def test_a_list_of_prompts_is_one_answer_of_several_generations() -> None:
    asked = {"model": CHAT, "prompt": ["one", "two"], "n": 2}
    async with served() as site:
        whole = (await site.ask("POST", "/v1/completions", asked)).json()
        events = (await site.ask("POST", "/v1/completions", {**asked, "stream": True})).events()
        prompts = {(request.prompt, request.n) for request in site.node.requests}
    assert prompts == {("one", 2), ("two", 2)}
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in whole["choices"]} == {"".join(WORDS)}
    cached = {"prompt_tokens_details": {"cached_tokens": 4}}
    assert whole["usage"] == {"prompt_tokens": 6, "completion_tokens": 20, "total_tokens": 26, **cached}
    assert events[-1] == "[DONE]" and events[-2]["mesh"]["seq"] == 20
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in events[:-1]) == 4


async def test_logprobs_have_the_form_of_each_endpoint() -> None:
    logprob = TokenLogprob(5, "né", -0.5, ((5, "né", -0.5), (6, "no", -1.5)))
    script: list[Step] = [started(), TextDelta(0, "né", (5,), 1, (logprob,)), ChoiceDone(0, "length", 1), finished(1)]
    async with served(FakeNode([list(script), list(script)])) as site:
        chat = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "logprobs": True, "top_logprobs": 2})
        plain = await site.ask("POST", "/v1/completions", {"prompt": [1, 2], "logprobs": 2})
        assert [request.sampling.logprobs for request in site.node.requests] == [2, 2]
        assert site.node.requests[1].prompt_ids == (1, 2)
    first = chat.json()["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == "né" and first["bytes"] == [110, 195, 169] and first["top_logprobs"][1]["token"] == "no"
    form = plain.json()["choices"][0]["logprobs"]
    assert form == {"tokens": ["né"], "token_logprobs": [-0.5], "top_logprobs": [{"né": -0.5, "no": -1.5}], "text_offset": [0]}


async def test_retrieval_is_told_with_its_citations() -> None:
    report = RetrievalReport("docs", "d9", 3, 4, (Citation(1, "file-1", "a.md", "quoted", 4, 10),))
    script = [*saying(("See [1].",))[:-1], finished(2, retrieval=report)]
    asked = {**QUESTION, "mesh": {"store": "docs", "top_k": 3}}
    async with served(FakeNode([list(script), list(script)])) as site:
        whole = (await site.ask("POST", "/v1/chat/completions", asked)).json()
        last = (await site.ask("POST", "/v1/chat/completions", {**asked, "stream": True})).events()[-2]
        assert site.node.requests[0].retrieval == Retrieval("docs", 3)
    cited = whole["choices"][0]["message"]["annotations"]
    assert cited[0]["file_id"] == "file-1" and (cited[0]["start"], cited[0]["end"]) == (4, 10)
    for mesh in (whole["mesh"], last["mesh"]):
        assert (mesh["store"], mesh["digest"], mesh["shards_ok"], mesh["shards_total"]) == ("docs", "d9", 3, 4)
        assert mesh["annotations"] == cited


async def test_a_refusal_before_the_first_event_is_a_status_even_for_a_stream() -> None:
    refusals = [
        (Refused("full", 2.0), 503, "overloaded"),
        (Refused("quota", 2.0, quota=True), 429, "rate_limit_exceeded"),
        (NoPath(CHAT, ((2, 4),)), 503, "no_path"),
        (ModelLoading(CHAT, ((2, 4),), 0.43, 2.0, ("b",)), 503, "model_loading"),
        (BadRequest("too long", "messages", "context_length_exceeded"), 400, "context_length_exceeded"),
        (DeadlineExceeded("late"), 504, "deadline_exceeded"),
    ]
    for error, status, code in refusals:
        for stream in (False, True):
            async with served(FakeNode([[error]])) as site:
                reply = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "stream": stream})
            assert (reply.status, reply.error["code"]) == (status, code)
            if status in (429, 503):
                assert 1 <= int(reply.headers["retry-after"]) <= 60
                assert 2000 <= int(reply.headers["retry-after-ms"]) <= 3000
                assert reply.headers["x-request-id"]


async def test_a_model_that_is_being_loaded_is_told_with_progress_and_when_to_come_again() -> None:
    for eta_s, waits_s in ((12.3, (13, 19)), (0.0, (1, 2)), (5000.0, (60, 60))):
        async with served(FakeNode([[ModelLoading(CHAT, ((0, 1), (2, 4)), 0.434, eta_s, ("b",))]])) as site:
            reply = await site.ask("POST", "/v1/chat/completions", QUESTION)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (503, "model_loading", None)
        told = {name: reply.error[name] for name in ("progress", "layers", "eta_s")}
        assert told == {"progress": 0.43, "layers": [[0, 1], [2, 4]], "eta_s": eta_s}
        assert "being loaded by b" in reply.error["message"] and "start one" not in reply.error["message"]
        assert waits_s[0] <= int(reply.headers["retry-after"]) <= waits_s[1]


async def test_a_stream_that_fails_in_the_middle_ends_with_the_error_and_without_done() -> None:
    script = [*saying()[:5], DeadlineExceeded("too late")]
    async with served(FakeNode([list(script)])) as site:
        reply = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "stream": True})
        assert site.node.open_generations == 0
    events = reply.events()
    assert reply.whole
    assert "[DONE]" not in events
    assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["", "Hello", ","]
    assert events[-1]["error"]["code"] == "deadline_exceeded"


async def test_one_failed_generation_ends_the_answer_of_several_prompts() -> None:
    asked = {"prompt": ["a", "b"]}
    for stream in (False, True):
        scripts: list[list[Step]] = [[started(), HANG], [started(), HANG_A_MOMENT, DeadlineExceeded("too late")]]
        async with served(FakeNode(scripts)) as site:
            with trio.fail_after(5):
                reply = await site.ask("POST", "/v1/completions", {**asked, "stream": stream})
            assert site.node.open_generations == 0
        assert reply.whole
        error = reply.events()[-1]["error"] if stream else reply.error
        assert error["code"] == "deadline_exceeded"


async def test_a_bug_in_mid_stream_tells_no_internals_and_is_counted() -> None:
    script = [*saying()[:3], HANG_A_MOMENT, RuntimeError("the secret prompt")]
    async with served(FakeNode([list(script), [RuntimeError("the secret prompt")]])) as site:
        streamed = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "stream": True})
        whole = await site.ask("POST", "/v1/chat/completions", QUESTION)
        assert site.app.statistics().failures_total == 2
        assert site.node.open_generations == 0
    assert streamed.events()[-1]["error"]["type"] == "server_error"
    assert whole.status == 500 and whole.error["code"] == "internal_error"
    assert b"secret" not in streamed.body + whole.body


async def test_a_stream_this_node_cannot_go_on_with_is_cut_not_ended() -> None:
    script = [*saying()[:3], HANG_A_MOMENT, PeerLost("x", "deposed")]
    async with served(FakeNode([list(script)])) as site:
        reply = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "stream": True})
    assert reply.status == 200 and not reply.whole
    assert b"error" not in reply.body and b"DONE" not in reply.body


async def test_a_generation_that_just_stops_is_our_bug_not_an_answer() -> None:
    async with served(FakeNode([saying()[:-1]])) as site:
        reply = await site.ask("POST", "/v1/chat/completions", QUESTION)
    assert reply.status == 500


async def test_a_client_that_hangs_up_frees_its_generation_streaming_or_not() -> None:
    for stream in (False, True):
        node = FakeNode([[*saying()[:3], HANG]])
        async with served(node) as site:
            body = msgspec.json.encode({**QUESTION, "stream": stream})
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
            client = await site.connect()
            await client.send_all(head.encode() + body)
            await node.begun.wait()
            if stream:
                await client.receive_some(1)
            await client.aclose()
            with trio.fail_after(5):
                await node.left.wait()
            assert node.open_generations == 0


async def test_a_silent_stream_is_pinged_with_one_newline(autojump_clock: trio.testing.MockClock) -> None:
    node = FakeNode([[started(), 13.0, *saying()[1:]]])
    app = make_app(node, auth=None, bound=("127.0.0.1", 0))
    sent: list[tuple[float, bytes]] = []
    await ask_in_memory(app, {**QUESTION, "stream": True}, sent)
    body = b"".join(part for _, part in sent)
    assert body.count(b": ping\n") == 3 and b": ping\n\n" not in body
    times = [at for at, _ in sent]
    assert max(later - earlier for earlier, later in pairwise(times)) < 5


async def test_tokens_that_are_ready_share_a_write_and_order_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    words = [f"w{number} " for number in range(40)]
    node = FakeNode([[step for step in saying(words) if not isinstance(step, float)]])
    sent: list[tuple[float, bytes]] = []
    await ask_in_memory(make_app(node, auth=None, bound=("127.0.0.1", 0)), {**QUESTION, "stream": True}, sent, write_s=0.5)
    body = b"".join(part for _, part in sent)
    assert len(sent) <= 3
    events = [line for line in body.decode().split("\n\n") if line]
    text = "".join(msgspec.json.decode(line[6:])["choices"][0]["delta"].get("content", "") for line in events[:-1])
    assert text == "".join(words)


async def test_event_ids_come_only_when_asked_for() -> None:
    async with served() as site:
        reply = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "stream": True}, {"x-mesh-sse-id": "1"})
    ids = [line for line in reply.body.split(b"\n") if line.startswith(b"id: ")]
    assert ids == [b"id: %d" % seq for seq in range(6)]


async def test_unknown_models_embedders_and_models_with_gaps_are_told_apart() -> None:
    async with served(FakeNode([[NoPath(SPLIT, ((2, 4),))]])) as site:
        unknown = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "model": "gpt-9"})
        embedder = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "model": "tiny-embed"})
        gap = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "model": SPLIT})
    assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")
    assert (embedder.status, embedder.error["param"]) == (400, "model")
    assert gap.status == 503 and "2:4" in gap.error["message"]


async def test_a_stream_can_be_cancelled_and_explained_by_its_ids() -> None:
    async with served() as site:
        id = (await site.ask("POST", "/v1/chat/completions", QUESTION, {"x-request-id": "r.1"})).json()["id"]
        cancelled = await site.ask("DELETE", f"/v1/streams/{id}")
        unknown = await site.ask("DELETE", "/v1/streams/chatcmpl-none")
        told = [await site.ask("GET", f"/mesh/requests/{name}") for name in (id, "r.1", "none")]
        assert site.node.cancelled == [id, "chatcmpl-none"]
    assert cancelled.json()["cancelled"] is True
    assert unknown.status == 404
    assert [reply.status for reply in told] == [200, 200, 404]


async def test_cancelling_an_answer_to_several_prompts_cancels_all_its_generations() -> None:
    async with served() as site:
        id = (await site.ask("POST", "/v1/completions", {"prompt": ["a", "b", "c"]})).json()["id"]
        assert (await site.ask("DELETE", f"/v1/streams/{id}")).status == 200
        assert {request.id for request in site.node.requests} <= set(site.node.cancelled)
