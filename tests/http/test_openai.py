"""Requests as they come, as `GenerateRequest`s or as refusals: pure, by tables."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mesh.errors import BadRequest
from mesh.ids import StreamId
from node.http.openai import UNSUPPORTED, parse_chat, parse_completion
from node.requests import GenerateRequest, Retrieval, SamplingParams

ID = StreamId("chatcmpl-1")
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> GenerateRequest:
    return parse_chat(msgspec.json.encode({**HI, **fields}), ID, tenant="t", request_id="r").generations[0]


def refusal(parse: Any = parse_chat, **fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        parse(msgspec.json.encode({**(HI if parse is parse_chat else {}), **fields}), ID)
    assert refused.value.status == 400
    return refused.value


def test_the_least_request_leaves_everything_to_the_node() -> None:
    unset = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
    said = ({"role": "user", "content": "hi"},)
    assert chat() == GenerateRequest(ID, None, messages=said, sampling=SamplingParams(), unset=unset, tenant="t", request_id="r")


def test_null_counts_as_absent() -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "max_tokens", "logit_bias", "stream", "stream_options", "tools", "mesh")
    assert chat(**dict.fromkeys(names)) == chat()


def test_every_field_finds_its_place() -> None:
    request = chat(
        model="m", temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, n=3, seed=-5, stop="END", max_tokens=9,
        max_completion_tokens=7, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.5, logit_bias={"3": 4},
        min_tokens=2, ignore_eos=True,
        stop_token_ids=[8], include_stop_str_in_output=True, logprobs=True, top_logprobs=2, user="u", priority=3,
        mesh={"store": "docs", "top_k": 2, "deadline_s": 1.5, "policy": "round_robin"},
    )  # fmt: skip
    assert not request.unset
    assert request.sampling == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.5,
        logit_bias={3: 4.0}, min_tokens=2, ignore_eos=True, stop_token_ids=(8,), logprobs=2,
    )  # fmt: skip
    assert (request.model, request.n, request.seed, request.stop, request.max_tokens) == ("m", 3, -5, ("END",), 7)
    assert request.include_stop and request.retrieval == Retrieval("docs", 2)
    assert (request.deadline_s, request.policy, request.priority) == (1.5, "round_robin", 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 10**9 * 5}, "max_completion_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": "a"}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template": "{{x}}"}, "chat_template"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"mesh": {"store": ""}}, "mesh.store"),
        ({"mesh": {"store": "a", "top_k": 0}}, "mesh.top_k"),
        ({"mesh": {"deadline_s": -1}}, "mesh.deadline_s"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "a", "name": 3}]}, "messages[0].name"),
    ],
)  # fmt: skip
def test_a_chat_field_out_of_range_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": ["a", []]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "mesh": {"store": "docs"}}, "mesh.store"),
    ],
)
def test_a_completion_field_out_of_range_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal(parse_completion, **fields).param == param


def test_the_forms_of_a_prompt() -> None:
    def prompts(prompt: Any) -> list[Any]:
        asked = parse_completion(msgspec.json.encode({"prompt": prompt}), StreamId("cmpl-1"))
        assert len({request.id for request in asked.generations}) == len(asked.generations)
        assert asked.generations[0].id == asked.id
        return [request.prompt if request.prompt is not None else request.prompt_ids for request in asked.generations]

    assert prompts("a") == ["a"]
    assert prompts([1, 2]) == [(1, 2)]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([[1], [2, 3]]) == [(1,), (2, 3)]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_field_that_would_change_the_meaning_passes_only_when_it_asks_for_nothing(name: str) -> None:
    for neutral in UNSUPPORTED[name]:
        assert chat(**{name: neutral}) == chat()
    assert refusal(**{name: {"something": "else"}}).param == name


def test_harmless_fields_are_ignored() -> None:
    assert (
        chat(store=True, metadata={"a": 1}, parallel_tool_calls=True, service_tier="auto", made_up=1, tool_choice="none")
        == chat()
    )
    assert chat(tools=[], tool_choice="none") == chat()


def test_text_parts_are_joined_and_developer_speaks_as_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": None}])
    assert request.messages == ({"role": "system", "content": "a\nb"}, {"role": "assistant", "content": ""})
