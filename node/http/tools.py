"""The functions that a chat request offers, and whether they must be called. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mesh.errors import BadRequest
from node.http.errors import unexpected_field
from node.http.schema import ChatBody
from node.requests import ToolUse
from node.text.grammar import check_schema

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def parse_tools(body: ChatBody) -> ToolUse | None:
    """None where the request offers none.

    Raises:
        BadRequest: with the field's path.
    """
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ()))
    names = [tool["function"]["name"] for tool in tools]
    if len(tools) > MAX_TOOLS:
        raise BadRequest(f"tools: expected at most {MAX_TOOLS}, got {len(tools)}", "tools")
    if len(set(names)) < len(names):
        raise BadRequest("tools: expected each function's name once", "tools")
    parallel = body.parallel_tool_calls is not False
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return ToolUse(tools, "none" if choice == "none" else "auto", parallel=parallel) if tools else None
    if not tools:
        raise BadRequest("tool_choice: there are no tools to choose; expected none or auto", "tool_choice")
    if choice == "required":
        return ToolUse(tools, "required", parallel=parallel)
    named = _named(choice)
    if named not in names:
        raise unexpected_field(f"a function among {', '.join(names)}", named, "tool_choice.function.name")
    return ToolUse(tools, "required", named, parallel)


def _named(choice: Any) -> Any:
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or choice.get("type", "function") != "function":
        raise unexpected_field("none, auto, required, or an object that names a function", choice, "tool_choice")
    return function.get("name")


def _tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise unexpected_field("function", tool.get("type"), f"{param}.type")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise unexpected_field("an object with a name", function, f"{param}.function")
    name, description, parameters = (function.get(field) for field in ("name", "description", "parameters"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise unexpected_field("1 to 64 letters, digits, _ or -", name, f"{param}.function.name")
    if not isinstance(description, str | None):
        raise unexpected_field("a text", description, f"{param}.function.description")
    if not isinstance(parameters, dict | None):
        raise unexpected_field("a JSON schema", parameters, f"{param}.function.parameters")
    check_schema(parameters, f"{param}.function.parameters")
    known = {"name": name, "description": description, "parameters": parameters, "strict": function.get("strict")}
    return {"type": "function", "function": {field: value for field, value in known.items() if value is not None}}
