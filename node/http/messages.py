"""A conversation as clients send it, checked and brought to one form: role, content as one text, name, tool calls. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.errors import BadRequest
from node.http.errors import unexpected_field

MAX_MESSAGES = 4096
MAX_CALLS = 128  # of one assistant message
ROLES = ("system", "developer", "user", "assistant", "tool")


def parse_messages(messages: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Raises BadRequest with the field's path."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise BadRequest(f"messages: expected 1 to {MAX_MESSAGES} messages, got {len(messages)}", "messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: Mapping[str, Any], param: str) -> dict[str, Any]:
    """`developer` is the newer word for `system`."""
    role = message.get("role")
    if role not in ROLES:
        raise unexpected_field(f"one of {', '.join(ROLES)}", role, f"{param}.role")
    for field in ("function_call", "audio"):
        if message.get(field):
            raise BadRequest(f"{param}.{field}: not supported here", f"{param}.{field}")
    cleaned = {"role": "system" if role == "developer" else role, "content": _content(message, role, f"{param}.content")}
    name = message.get("name")
    if name is not None:
        cleaned["name"] = _text(name, f"{param}.name")
    if message.get("tool_calls"):
        cleaned["tool_calls"] = _tool_calls(message["tool_calls"], role, f"{param}.tool_calls")
    if role == "tool":
        cleaned["tool_call_id"] = _text(message.get("tool_call_id"), f"{param}.tool_call_id")
    return cleaned


def _tool_calls(calls: Any, role: str, param: str) -> list[dict[str, Any]]:
    if role != "assistant" or not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise unexpected_field(f"a list of at most {MAX_CALLS} calls in an assistant's message", calls, param)
    cleaned = []
    for index, call in enumerate(calls):
        where = f"{param}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise unexpected_field("an object of type function", call, where)
        told = {
            "name": _text(function.get("name"), f"{where}.function.name"),
            "arguments": _text(function.get("arguments"), f"{where}.function.arguments"),
        }
        cleaned.append({"id": _text(call.get("id"), f"{where}.id"), "type": "function", "function": told})
    return cleaned


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise unexpected_field("a text", value, param)
    return value


def _content(message: Mapping[str, Any], role: str, param: str) -> str:
    """Text parts are joined by newlines, as vLLM does for models that take text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise unexpected_field("a text or a list of text parts", content, param)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text"):
            raise BadRequest(
                f"{param}[{index}]: expected a part of type text; others are not supported", f"{param}[{index}].type"
            )
        texts.append(_text(part.get("text"), f"{param}[{index}].text"))
    return "\n".join(texts)
