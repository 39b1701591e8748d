"""Tool calls in the forms of OpenAI's answers: deltas of a stream, and the list in a whole message. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from node.requests import ToolUse
from node.text.tool_calls import CallArguments, CallStarted, PlainText, ToolCallParser, ToolEvent, call_id
from node.text.tool_styles import STYLES

MAX_CALLS = 128  # of one answer; further ones are dropped


def parser_for(use: ToolUse | None, style: str, stream: str, choice: int) -> ToolCallParser | None:
    """None where the answer's text is text, whatever it looks like."""
    if use is None or not style:
        return None
    known = STYLES[style]
    most = MAX_CALLS if use.parallel and not use.named else 1
    id_of = partial(call_id, stream, choice, digits=known.id_digits)
    return ToolCallParser(known, use.names, id_of, most=most)


def delta_of(events: Iterable[ToolEvent]) -> dict[str, Any]:
    """What came of a piece of text, as one delta: text and calls side by side, each call once."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case PlainText(text):
                delta["content"] = delta.get("content", "") + text
            case CallStarted(index, id, name):
                calls[index] = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            case CallArguments(index, text):
                calls.setdefault(index, {"index": index, "function": {"arguments": ""}})["function"]["arguments"] += text
    return {**delta, "tool_calls": list(calls.values())} if calls else delta


def message_of(parser: ToolCallParser | None, text: str) -> dict[str, Any]:
    """The fields of a whole message that its text makes."""
    if parser is None:
        return {"content": text}
    delta = delta_of([*parser.feed(text), *parser.finish()])
    calls = [{field: value for field, value in call.items() if field != "index"} for call in delta.get("tool_calls", ())]
    content = delta.get("content")
    return {"content": content, "tool_calls": calls} if calls else {"content": content or ""}


def ending(reason: str, parser: ToolCallParser | None, use: ToolUse | None) -> str:
    """The finish reason: that tools were called, unless they had to be by name; then OpenAI says stop."""
    called = parser is not None and parser.calls > 0 and use is not None and use.named is None
    return "tool_calls" if called and reason == "stop" else reason
