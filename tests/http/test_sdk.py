"""The official `openai` client, unchanged, against the real server on loopback."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import openai
import pytest
import trio

from mesh.errors import DeadlineExceeded, Refused
from tests.http.fake_node import CHAT, EMBED, HANG, WORDS, FakeNode, saying
from tests.http.served import Served, served
from tests.http.test_tools import CALLS, CLOCK, WEATHER, writing

TEXT = "".join(WORDS)
T = TypeVar("T")
TOOLS: Any = [WEATHER, CLOCK]


async def with_sdk(site: Served, ask: Callable[[openai.OpenAI], T]) -> T:
    """Runs the synchronous client in a thread, as a program of its own would."""

    def run() -> T:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="none", max_retries=0) as client:
            return ask(client)

    return await trio.to_thread.run_sync(run)


MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]


async def test_chat_and_its_stream() -> None:
    def ask(client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=0, seed=1, max_tokens=9)
        assert answer.choices[0].message.content == TEXT
        assert answer.usage is not None and answer.usage.completion_tokens == 5
        assert answer.model_extra is not None and answer.model_extra["mesh"]["numerics"] == "exact"
        stream = client.chat.completions.create(
            model=CHAT, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 5}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
        assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 8
        assert [chunk.model_extra["mesh"]["seq"] for chunk in chunks if chunk.model_extra] == [0, 1, 2, 3, 4, 5, 5]

    async with served() as site:
        await with_sdk(site, ask)
        first, second = site.node.requests
    assert first.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert (first.seed, first.max_tokens, first.sampling.temperature) == (1, 9, 0.0)
    assert second.sampling.top_k == 5 and second.max_tokens is None


async def test_functions_are_offered_called_and_answered() -> None:
    def ask(client: openai.OpenAI) -> None:
        whole = client.chat.completions.create(model=CHAT, messages=MESSAGES, tools=TOOLS)
        [call, other] = whole.choices[0].message.tool_calls or []
        assert whole.choices[0].finish_reason == "tool_calls" and call.type == other.type == "function"
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Ulm"}')
        told: Any = [*MESSAGES, whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
        client.chat.completions.create(model=CHAT, messages=told, tools=TOOLS, tool_choice="none")
        with client.chat.completions.stream(model=CHAT, messages=MESSAGES, tools=TOOLS) as stream:
            final = stream.get_final_completion()
        assert [made.function.arguments for made in final.choices[0].message.tool_calls or []] == ['{"city": "Ulm"}', "{}"]
        assert final.choices[0].message.content == whole.choices[0].message.content == "Let me look."

    async with served(FakeNode([writing(CALLS), saying(), writing(CALLS)])) as site:
        await with_sdk(site, ask)
        second = site.node.requests[1]
    assert second.messages is not None and [message["role"] for message in second.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
    ]
    calls = second.messages[2]["tool_calls"]
    assert isinstance(calls, list) and calls[0]["function"]["name"] == "weather"


async def test_plain_completions() -> None:
    def ask(client: openai.OpenAI) -> None:
        answer = client.completions.create(model=CHAT, prompt=["a", "b"], stop=["x"], logit_bias={"5": -1})
        assert [choice.text for choice in answer.choices] == [TEXT, TEXT]
        assert "".join(chunk.choices[0].text for chunk in client.completions.create(model=CHAT, prompt="a", stream=True)) == TEXT

    async with served() as site:
        await with_sdk(site, ask)
        assert site.node.requests[0].stop == ("x",) and site.node.requests[0].sampling.logit_bias == {5: -1.0}


async def test_models_and_embeddings_in_both_encodings() -> None:
    def ask(client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == [CHAT, EMBED]
        assert client.models.retrieve(CHAT).model_extra["max_model_len"] == 128  # type: ignore[index]
        by_default = client.embeddings.create(model=EMBED, input=["four", "a b"])
        as_floats = client.embeddings.create(model=EMBED, input=["four", "a b"], encoding_format="float")
        assert (
            [row.embedding for row in by_default.data]
            == [row.embedding for row in as_floats.data]
            == [[4, 0.5, -0.25], [3, 0.5, -0.25]]
        )
        assert by_default.usage.prompt_tokens == 3

    async with served() as site:
        await with_sdk(site, ask)


async def test_files_stores_and_search() -> None:
    def ask(client: openai.OpenAI) -> None:
        file = client.files.create(file=('größe "1".md', b"alpha beta\r\n--x\r\ngamma"), purpose="assistants")
        assert file.filename == 'größe "1".md' and file.bytes == 22
        assert client.files.content(file.id).read() == b"alpha beta\r\n--x\r\ngamma"
        assert [listed.id for listed in client.files.list()] == [file.id]
        store = client.vector_stores.create(name="docs")
        attached = client.vector_stores.files.create_and_poll(vector_store_id=store.id, file_id=file.id)
        assert attached.status == "completed"
        assert client.vector_stores.retrieve("docs").file_counts.completed == 1
        assert [listed.name for listed in client.vector_stores.list()] == ["docs"]
        options: Any = {"hybrid_search": {"embedding_weight": 0.0, "text_weight": 1.0}}
        found = list(client.vector_stores.search("docs", query="beta", max_num_results=3, ranking_options=options))
        assert found[0].file_id == file.id and "beta" in found[0].content[0].text
        assert client.vector_stores.files.delete(file_id=file.id, vector_store_id=store.id).deleted
        assert list(client.vector_stores.files.list(store.id)) == []
        assert client.files.delete(file.id).deleted
        assert client.vector_stores.delete(store.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.vector_stores.retrieve("docs")
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)

    async with served() as site:
        await with_sdk(site, ask)
        assert site.node.weights == (0.0, 1.0)


async def test_errors_are_the_clients_own_classes() -> None:
    def ask(client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=3)
        assert bad.value.param == "temperature" and bad.value.request_id
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=CHAT, messages=MESSAGES)
        with pytest.raises(openai.APIError, match="too late"):
            list(client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True))

    node = FakeNode([[Refused("quota", quota=True)], [*saying()[:4], DeadlineExceeded("too late")]])
    async with served(node) as site:
        await with_sdk(site, ask)


@pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx2|httpcore2):ResourceWarning")  # theirs, left to the collector
async def test_the_asynchronous_client_on_trio() -> None:
    async with served() as site:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(model=CHAT, messages=MESSAGES)
            assert answer.choices[0].message.content == TEXT
            stream = await client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT
        del stream
        gc.collect()


async def test_a_stream_that_the_client_leaves_early_is_freed() -> None:
    def ask(client: openai.OpenAI) -> None:
        with client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True) as stream:
            next(iter(stream))

    node = FakeNode([[*saying()[:3], HANG]])
    async with served(node) as site:
        await with_sdk(site, ask)
        with trio.fail_after(5):
            await node.left.wait()
        assert node.open_generations == 0
