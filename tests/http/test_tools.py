"""What a chat request may say about functions, and the forms in which their calls come back."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mesh.errors import BadRequest
from mesh.ids import StreamId
from node.http.openai import parse_chat
from node.requests import ChoiceDone, GenerateRequest, Started, TextDelta, ToolUse
from tests.http.fake_node import CHAT, FakeNode, Step, finished
from tests.http.served import served

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time"}}
QUESTION = {"model": CHAT, "messages": [{"role": "user", "content": "?"}], "tools": [WEATHER, CLOCK]}
CALLS = (
    'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)


def asked(**fields: Any) -> GenerateRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat(msgspec.json.encode(body), StreamId("chatcmpl-1")).generations[0]


def writing(text: str, reason: str = "stop", choices: int = 1, style: str = "hermes") -> list[Step]:
    """A model that writes `text`, three letters a token, on every choice."""
    script: list[Step] = [Started(CHAT, 7, 3, style)]
    seq = 0
    for start in range(0, len(text), 3):
        for choice in range(choices):
            seq += 1
            script.append(TextDelta(choice, text[start : start + 3], (start,), seq))
    for choice in range(choices):
        seq += 1
        script.append(ChoiceDone(choice, reason, seq, (2,)))
    return [*script, finished(seq)]


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({}, None),
        ({"tools": []}, None),
        ({"tools": None, "tool_choice": "auto"}, None),
        ({"tools": [WEATHER]}, ToolUse((WEATHER,))),
        ({"tools": [WEATHER], "tool_choice": "none"}, ToolUse((WEATHER,), "none")),
        ({"tools": [WEATHER], "tool_choice": "required"}, ToolUse((WEATHER,), "required")),
        ({"tools": [CLOCK], "parallel_tool_calls": False}, ToolUse((CLOCK,), parallel=False)),
        (
            {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "function", "function": {"name": "clock"}}},
            ToolUse((WEATHER, CLOCK), "required", "clock"),
        ),
    ],
)
def test_the_forms_of_offering_functions(fields: Any, use: ToolUse | None) -> None:
    assert asked(**fields).tools == use


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{**CLOCK, "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": 3}}]}, "tools[0].function.description"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"$ref": "http://127.0.0.1/x"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "old"}]}, "functions"),
    ],
)
def test_other_forms_are_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        asked(**fields)
    assert refused.value.param == param


def test_calls_and_their_results_come_back_in_a_conversation() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "noon"}]},
    ]
    assert asked(messages=messages).messages == (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
    )


async def test_a_whole_answer_lists_its_calls() -> None:
    async with served(FakeNode([writing(CALLS)])) as site:
        choice = (await site.ask("POST", "/v1/chat/completions", QUESTION)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": '{"city": "Ulm"}'},
        {"name": "clock", "arguments": "{}"},
    ]
    assert all(
        call["type"] == "function" and call["id"].startswith("call_") and set(call) == {"id", "type", "function"}
        for call in calls
    )
    assert len({call["id"] for call in calls}) == 2


async def test_a_stream_brings_each_call_once_by_name_and_then_its_arguments_as_they_come() -> None:
    async with served(FakeNode([writing(CALLS, choices=2)])) as site:
        events = (await site.ask("POST", "/v1/chat/completions", {**QUESTION, "n": 2, "stream": True})).events()
    texts = ["", ""]
    calls: list[dict[int, dict[str, Any]]] = [{}, {}]
    pieces = 0
    reasons = []
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            delta, mine = choice["delta"], calls[choice["index"]]
            texts[choice["index"]] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] not in mine:
                    assert call["type"] == "function" and call["id"] and call["function"]["name"]
                    mine[call["index"]] = {"id": call["id"], "name": call["function"]["name"], "arguments": ""}
                else:
                    assert set(call) == {"index", "function"}
                pieces += 1
                mine[call["index"]]["arguments"] += call["function"]["arguments"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert texts == ["Let me look."] * 2 and reasons == ["tool_calls"] * 2
    for mine in calls:
        assert [(call["name"], call["arguments"]) for call in mine.values()] == [("weather", '{"city": "Ulm"}'), ("clock", "{}")]
    assert pieces > 8
    assert len({call["id"] for mine in calls for call in mine.values()}) == 4
    assert events[-2]["mesh"]["seq"] == 2 * (-(-len(CALLS) // 3) + 1)


async def test_text_that_only_began_like_a_call_is_all_there() -> None:
    text = 'a < b, and <tool_call> is a marker; {"name": "none"}'
    async with served(FakeNode([writing(text), writing(text)])) as site:
        whole = (await site.ask("POST", "/v1/chat/completions", QUESTION)).json()["choices"][0]
        events = (await site.ask("POST", "/v1/chat/completions", {**QUESTION, "stream": True})).events()
    assert whole["message"] == {"role": "assistant", "content": text, "refusal": None} and whole["finish_reason"] == "stop"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events[:-1]) == text


async def test_the_reason_is_stop_for_a_function_forced_by_name_and_length_for_a_call_cut_short() -> None:
    named = {**QUESTION, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    begun = CALLS.index('{"city"')
    async with served(FakeNode([writing(CALLS), writing(CALLS[: begun + 9], "length")])) as site:
        forced = (await site.ask("POST", "/v1/chat/completions", named)).json()["choices"][0]
        cut = (await site.ask("POST", "/v1/chat/completions", QUESTION)).json()["choices"][0]
    assert forced["finish_reason"] == "stop" and len(forced["message"]["tool_calls"]) == 1
    assert cut["finish_reason"] == "length" and cut["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": '


async def test_without_offered_functions_nothing_is_taken_for_a_call() -> None:
    async with served(FakeNode([writing(CALLS, style=""), writing(CALLS)])) as site:
        unoffered = {field: value for field, value in QUESTION.items() if field != "tools"}
        for body in ({**QUESTION, "tool_choice": "none"}, unoffered):
            message = (await site.ask("POST", "/v1/chat/completions", body)).json()["choices"][0]["message"]
            assert message["content"] == CALLS and "tool_calls" not in message
