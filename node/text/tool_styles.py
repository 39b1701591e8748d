"""How model families write tool calls, read from their chat templates. Pure.

Each family was trained on one way to write a call into the text. The template shows which; where it does not mention tools, we
tell the model of them in a system message, and ask for the way that most open models share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mesh.json_object import JsonObject
from node.requests import Grammar, ToolUse
from node.text.grammar import JSON_SPACING, lark_text

MAX_FORCED_CALLS = 8  # of one answer that must call tools
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """`opening` and `closing` stand around a call, or around a list of them where `listed`."""

    name: str
    opening: str
    closing: str
    listed: bool = False
    arguments: str = "arguments"  # the key of a call's arguments
    between: str = "\n"  # what may stand between two calls
    id_digits: int = 24  # length of call ids; below 24 bare letters and digits


HERMES = ToolStyle("hermes", "<tool_call>", "</tool_call>")
MISTRAL = ToolStyle("mistral", "[TOOL_CALLS]", "]", listed=True, between=", ", id_digits=9)
LLAMA = ToolStyle("llama", "", "", arguments="parameters", between="; ")
PLAIN = ToolStyle("plain", "", "", between="; ")
STYLES = {style.name: style for style in (HERMES, MISTRAL, LLAMA, PLAIN)}


def style_of(template: str) -> ToolStyle:
    """The style a chat template was written for."""
    if HERMES.opening in template:
        return HERMES
    if MISTRAL.opening in template:
        return MISTRAL
    if not knows_tools(template):
        return HERMES
    return LLAMA if '"parameters":' in template.replace("'", '"') else PLAIN


def knows_tools(template: str) -> bool:
    return "tools" in template


def conversation(messages: Sequence[Mapping[str, object]], use: ToolUse | None, template: str) -> list[JsonObject]:
    """Returns the messages as the template takes them: with calls' arguments as objects, or in text where it has no tools."""
    if knows_tools(template):
        return [_with_objects(dict(message)) for message in messages]
    as_text = [_as_text(dict(message)) for message in messages]
    if use is None or use.choice == "none":
        return as_text
    described = _description(use)
    if as_text and as_text[0]["role"] == "system":
        return [{**as_text[0], "content": f"{as_text[0]['content']}\n\n{described}"}, *as_text[1:]]
    return [{"role": "system", "content": described}, *as_text]


def _with_objects(message: JsonObject) -> JsonObject:
    if "tool_calls" not in message:
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = {**call["function"], "arguments": _object_of(call["function"]["arguments"])}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _object_of(arguments: str) -> object:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _as_text(message: JsonObject) -> JsonObject:
    """A tool's message as a user's, an assistant's calls as the text that makes them."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [_call_text(call["function"]) for call in message.get("tool_calls", ())]
    text = "\n".join([*([message["content"]] if message["content"] else []), *calls])
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}


def _call_text(function: JsonObject) -> str:
    body = json.dumps({"name": function["name"], HERMES.arguments: _object_of(function["arguments"])}, ensure_ascii=False)
    return f"{HERMES.opening}\n{body}\n{HERMES.closing}"


def _description(use: ToolUse) -> str:
    lines = [json.dumps(function, ensure_ascii=False) for function in use.functions]
    form = f'{HERMES.opening}\n{{"name": NAME, "{HERMES.arguments}": OBJECT}}\n{HERMES.closing}'
    return "You can call these functions, each described as JSON:\n" + "\n".join(lines) + f"\n\nTo call one, write\n{form}"


def grammar_for(
    use: ToolUse, style: ToolStyle, special_id: Callable[[str], int | None], answer: Grammar | None
) -> Grammar | None:
    """What the text must be: calls where they are forced; else what the request requires of an answer, or calls.

    `special_id`: the token that a marker is, where it has one of its own that is no text.
    """
    calls = _calls_grammar(use, style, special_id)
    if use.forced:
        return Grammar("lark", "start: calls\n" + calls, param="tools")
    if answer is None or answer.kind != "json":
        return answer
    schema = _inline(json.loads(answer.source), lenient=answer.lenient)
    return Grammar("lark", f"start: answer | calls\nanswer: {schema}\n{calls}", param=answer.param)


def _calls_grammar(use: ToolUse, style: ToolStyle, special_id: Callable[[str], int | None]) -> str:
    functions = [function for function in use.functions if use.named in (None, function["name"])]
    bodies = "\n".join(_body_rule(number, function, style) for number, function in enumerate(functions))
    call = " | ".join(f"call{number}" for number in range(len(functions)))
    more = MAX_FORCED_CALLS - 1 if use.parallel and not use.named else 0
    repeated = f" (BETWEEN call){{0,{more}}}" if more else ""
    opening, closing = _marker(style.opening, special_id), _marker(style.closing, special_id)
    if style.listed:
        rules = f'calls: {opening} "[" call{repeated} {closing}\ncall: {call}'
    elif style.opening:
        rules = f'calls: call{repeated}\ncall: {opening} "\\n" ({call}) "\\n" {closing}'
    else:
        rules = f"calls: call{repeated}\ncall: {call}"
    between = f"\nBETWEEN: {lark_text(style.between)}" if more else ""
    return f"{rules}\n{bodies}{between}\n"


def _marker(text: str, special_id: Callable[[str], int | None]) -> str:
    special = special_id(text)
    return lark_text(text) if special is None else f"<[{special}]>"


def _body_rule(number: int, function: Mapping[str, object], style: ToolStyle) -> str:
    before = f'{{"name": {json.dumps(function["name"])}, "{style.arguments}": '
    schema = _inline(function.get("parameters") or NO_PARAMETERS, lenient=function.get("strict") is not True)
    return f"call{number}: {lark_text(before)} arguments{number} {lark_text('}')}\narguments{number}: {schema}"


def _inline(schema: object, *, lenient: bool) -> str:
    bounded = schema if isinstance(schema, dict) else {}
    return "%json " + json.dumps({**bounded, "x-guidance": {**JSON_SPACING, "lenient": lenient}})
