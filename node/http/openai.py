"""Parses OpenAI's generation requests into `GenerateRequest`: messages, tools, structured outputs, sampling. Pure.

A field that would change the meaning of an answer and is not supported is refused by its name; unknown harmless fields are
ignored. A field that is `null` counts as absent, as the official clients send it. Of the ways to ask for structured output
(`response_format`, `structured_outputs`, the older `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`) one may be
used at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import msgspec

from mesh.errors import BadRequest
from mesh.ids import ModelId, StreamId
from mesh.json_object import JsonObject
from node.http.errors import unexpected_field
from node.http.schema import ChatBody, CompletionBody, GenerationBody, StructuredOutputs
from node.requests import GenerateRequest, Grammar, Retrieval, SamplingParams, ToolUse
from node.text.grammar import MAX_SOURCE_BYTES, check_schema
from node.text.sampling_defaults import RANGES

MAX_MESSAGES = 4096
MAX_CALLS = 128  # of one assistant message
ROLES = ("system", "developer", "user", "assistant", "tool")


def parse_messages(messages: list[JsonObject]) -> tuple[JsonObject, ...]:
    """Raises BadRequest with the field's path."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise BadRequest(f"messages: expected 1 to {MAX_MESSAGES} messages, got {len(messages)}", "messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: Mapping[str, object], param: str) -> JsonObject:
    """`developer` is the newer word for `system`."""
    role = message.get("role")
    if role not in ROLES:
        raise unexpected_field(f"one of {', '.join(ROLES)}", role, f"{param}.role")
    for field in ("function_call", "audio"):
        if message.get(field):
            raise BadRequest(f"{param}.{field}: not supported here", f"{param}.{field}")
    cleaned: JsonObject = {
        "role": "system" if role == "developer" else role,
        "content": _content(message, role, f"{param}.content"),
    }
    name = message.get("name")
    if name is not None:
        cleaned["name"] = _text(name, f"{param}.name")
    if message.get("tool_calls"):
        cleaned["tool_calls"] = _tool_calls(message["tool_calls"], role, f"{param}.tool_calls")
    if role == "tool":
        cleaned["tool_call_id"] = _text(message.get("tool_call_id"), f"{param}.tool_call_id")
    return cleaned


def _tool_calls(calls: object, role: str, param: str) -> list[JsonObject]:
    if role != "assistant" or not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise unexpected_field(f"a list of at most {MAX_CALLS} calls in an assistant's message", calls, param)
    cleaned = []
    for index, call in enumerate(calls):
        where = f"{param}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise unexpected_field("an object of type function", call, where)
        function = {
            "name": _text(function.get("name"), f"{where}.function.name"),
            "arguments": _text(function.get("arguments"), f"{where}.function.arguments"),
        }
        cleaned.append({"id": _text(call.get("id"), f"{where}.id"), "type": "function", "function": function})
    return cleaned


def _text(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise unexpected_field("a text", value, param)
    return value


def _content(message: Mapping[str, object], role: str, param: str) -> str:
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


MAX_CHOICE_TEXTS = 1024  # texts to choose among
ANY_OBJECT = {"type": "object"}
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


def parse_grammar(body: GenerationBody) -> Grammar | None:
    """The one grammar that the request names; None where any text will do.

    Raises:
        BadRequest: more than one, or of another form. Whether it compiles is seen later, by `node.text.grammar`.
    """
    asked = [grammar for grammar in (_response_format(body.response_format), *_extras(body)) if grammar is not None]
    if len(asked) > 1:
        raise BadRequest(f"{asked[1].param}: {asked[0].param} says already what the answer must be", asked[1].param)
    return asked[0] if asked else None


def _response_format(form: Mapping[str, object] | None) -> Grammar | None:
    match (form or {}).get("type", "text") if form else "text":
        case "text":
            return None
        case "json_object":
            return json_grammar(ANY_OBJECT, "response_format")
        case "json_schema":
            named = (form or {}).get("json_schema")
            if not isinstance(named, dict):
                raise unexpected_field("an object with name and schema", named, "response_format.json_schema")
            schema = named.get("schema", ANY_OBJECT)
            return json_grammar(schema, "response_format.json_schema.schema", lenient=named.get("strict") is not True)
        case other:
            raise unexpected_field("one of text, json_object, json_schema", other, "response_format.type")


def _extras(body: GenerationBody) -> list[Grammar]:
    outputs = body.structured_outputs or StructuredOutputs()
    asked = [(f"structured_outputs.{name}", name, getattr(outputs, name)) for name in StructuredOutputs.__struct_fields__]
    asked += [(old, name, getattr(body, old)) for old, name in GUIDED.items()]
    return [_extra(param, name, value) for param, name, value in asked if value not in (None, False, "", [])]


def _extra(param: str, name: str, value: object) -> Grammar:
    match name:
        case "json":
            return json_grammar(_read_schema(value, param), param)
        case "json_object":
            return json_grammar(ANY_OBJECT, param)
        case "choice":
            return choice_grammar(value, param)
        case "regex":
            return _text_grammar("regex", value, param)
        case "grammar":
            return _text_grammar("lark", value, param)
        case _:
            raise BadRequest(f"{param}: not supported here; leave it out", param)


def _read_schema(value: object, param: str) -> object:
    """A schema may come as an object or as its text."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        raise unexpected_field("a JSON schema", value, param) from None


def json_grammar(schema: object, param: str, *, lenient: bool = False) -> Grammar:
    """Raises BadRequest: no schema, too large, too deep, or it refers to other documents."""
    if not isinstance(schema, (dict, bool)):
        raise unexpected_field("a JSON schema", schema, param)
    check_schema(schema, param)
    return Grammar("json", _bounded(msgspec.json.encode(schema).decode(), param), lenient=lenient, param=param)


def choice_grammar(choices: object, param: str) -> Grammar:
    texts = choices if isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices) else []
    if not 1 <= len(texts) <= MAX_CHOICE_TEXTS:
        raise unexpected_field(f"1 to {MAX_CHOICE_TEXTS} texts that are not empty", choices, param)
    return Grammar("choice", _bounded(msgspec.json.encode(texts).decode(), param), param=param)


def _text_grammar(kind: Literal["regex", "lark"], value: object, param: str) -> Grammar:
    if not isinstance(value, str) or not value:
        raise unexpected_field("a text", value, param)
    return Grammar(kind, _bounded(value, param), param=param)


def _bounded(source: str, param: str) -> str:
    if len(source.encode()) > MAX_SOURCE_BYTES:
        raise BadRequest(f"{param}: expected at most {MAX_SOURCE_BYTES} bytes", param)
    return source


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
    if not isinstance(named, str) or named not in names:
        raise unexpected_field(f"a function among {', '.join(names)}", named, "tool_choice.function.name")
    return ToolUse(tools, "required", named, parallel)


def _named(choice: object) -> object:
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(function, dict) or choice.get("type", "function") != "function":
        raise unexpected_field("none, auto, required, or an object that names a function", choice, "tool_choice")
    return function.get("name")


def _tool(tool: Mapping[str, object], param: str) -> JsonObject:
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


MAX_CHOICES = 16
MAX_PROMPTS = 32
MAX_STOPS = 16
MAX_STOP_CHARS = 1024  # the entry holds text back by the longest one
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_PASSAGES = 50
MAX_PRIORITY = 100

Body = TypeVar("Body", bound=msgspec.Struct)

NEUTRAL_OFF: tuple[object, ...] = (None, False)
NEUTRAL_EMPTY: tuple[object, ...] = (None, [], {}, "")
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "echo": NEUTRAL_OFF,
    "suffix": (None, ""),
    "best_of": (None, 1),
    "use_beam_search": NEUTRAL_OFF,
    "chat_template": (None,),
    "chat_template_kwargs": NEUTRAL_EMPTY,
    "continue_final_message": NEUTRAL_OFF,
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, True),
    "skip_special_tokens": (None, True),
    "documents": NEUTRAL_EMPTY,
    "functions": NEUTRAL_EMPTY,
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "prompt_logprobs": (None,),
    "prompt_embeds": NEUTRAL_EMPTY,
    "truncate_prompt_tokens": (None,),
    "allowed_token_ids": NEUTRAL_EMPTY,
    "bad_words": NEUTRAL_EMPTY,
    "logits_processors": NEUTRAL_EMPTY,
}
"""Fields that would change the answer, with the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A generation request and the form its answer takes. Several prompts are several generations of one answer."""

    id: StreamId
    chat: bool
    generations: tuple[GenerateRequest, ...]
    n: int
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    logprobs: bool = False

    @property
    def tools(self) -> ToolUse | None:
        return self.generations[0].tools

    @property
    def choices(self) -> int:
        return self.n * len(self.generations)


def decode_body(raw: bytes, kind: type[Body]) -> tuple[Body, JsonObject]:
    """The JSON body as `kind`, and as the plain object it came as.

    Raises:
        BadRequest: not JSON, not an object, or a field of another type (`param` names it).
    """
    try:
        fields = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        fields = _with_special_floats(raw, error)
    except (RecursionError, UnicodeDecodeError) as error:
        raise BadRequest("expected a JSON object in UTF-8, nested less deeply", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise BadRequest("expected a JSON object as the body", code="invalid_json")
    try:
        return msgspec.convert(fields, kind), fields
    except msgspec.ValidationError as error:
        text = str(error)
        missing = re.search(r"missing required field `(\w+)`", text)
        where = re.search(r" - at `\$\.?(.*)`$", text)
        prefix = where.group(1).replace("[...]", "") if where else ""
        param = (f"{prefix}.{missing.group(1)}" if prefix else missing.group(1)) if missing else prefix
        raise BadRequest(text.replace("`$.", "`"), param or None) from error


def _with_special_floats(raw: bytes, error: Exception) -> object:
    """NaN and Infinity are no JSON, but Python's clients write them: read them, so that the answer can name the field."""
    malformed = BadRequest(f"expected JSON: {error}", code="invalid_json")
    if not (b"NaN" in raw or b"Infinity" in raw):
        raise malformed from error
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        raise malformed from error
    if isinstance(fields, dict):
        for name, value in fields.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise unexpected_field("a finite number", value, name)
    raise malformed from error


def parse_chat(raw: bytes, id: StreamId, *, tenant: str = "", request_id: str = "", retries: int = 0) -> ParsedRequest:
    """A body of `POST /v1/chat/completions`. Raises BadRequest."""
    body, fields = decode_body(raw, ChatBody)
    _refuse_unsupported(fields)
    logprobs = _top_logprobs(body)
    limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    base = _base_request(body, id, limit, limit_name, logprobs, tenant, request_id, retries)
    tools = parse_tools(body)
    if tools is not None and tools.forced and base.sampling.grammar is not None:
        asked = base.sampling.grammar.param
        raise BadRequest(f"{asked}: tool_choice says already what the answer must be", asked)
    request = replace(base, messages=parse_messages(body.messages), retrieval=_retrieval(body), tools=tools)
    return _asked(body, id, (request,), chat=True)


def parse_completion(raw: bytes, id: StreamId, *, tenant: str = "", request_id: str = "", retries: int = 0) -> ParsedRequest:
    """A body of `POST /v1/completions`. Raises BadRequest."""
    body, fields = decode_body(raw, CompletionBody)
    _refuse_unsupported(fields)
    if body.mesh is not None and body.mesh.store is not None:
        raise BadRequest("mesh.store: retrieval needs messages; ask /v1/chat/completions", "mesh.store")
    logprobs = _in_range("logprobs", body.logprobs, 0, MAX_TOP_LOGPROBS)
    base = _base_request(body, id, body.max_tokens, "max_tokens", logprobs, tenant, request_id, retries)
    prompts = _prompts(body.prompt)
    requests = []
    for own_id, prompt in zip(generation_ids(id), prompts):
        if isinstance(prompt, str):
            requests.append(replace(base, id=own_id, prompt=prompt))
        else:
            requests.append(replace(base, id=own_id, prompt_ids=prompt))
    return _asked(body, id, tuple(requests), chat=False)


def generation_ids(id: str) -> list[StreamId]:
    """The ids that the generations of one answer may have: its own, then numbered ones for further prompts."""
    further = MAX_PROMPTS if id.startswith("cmpl-") else 1
    return [StreamId(id), *(StreamId(f"{id}-{index}") for index in range(1, further))]


def _asked(body: GenerationBody, id: StreamId, requests: tuple[GenerateRequest, ...], *, chat: bool) -> ParsedRequest:
    options = body.stream_options
    if options is not None and not body.stream:
        raise BadRequest("stream_options: only a request with stream true takes them", "stream_options")
    return ParsedRequest(
        id=id,
        chat=chat,
        generations=requests,
        n=requests[0].n,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        token_ids=bool(body.return_token_ids),
        logprobs=requests[0].sampling.logprobs is not None,
    )


def _base_request(
    body: GenerationBody,
    id: StreamId,
    limit: int | None,
    limit_name: str,
    logprobs: int | None,
    tenant: str,
    request_id: str,
    retries: int,
) -> GenerateRequest:
    options = body.mesh
    if options is not None and options.deadline_s is not None:
        _in_range("mesh.deadline_s", options.deadline_s, 0.001, 86400.0)
    limit = _in_range(limit_name, limit, 1, MAX_TOKEN_ID)
    if limit is not None and (body.min_tokens or 0) > limit:
        raise BadRequest(f"min_tokens: expected at most {limit_name}, {limit}, got {body.min_tokens}", "min_tokens")
    return GenerateRequest(
        id=id,
        model=ModelId(body.model) if body.model else None,
        sampling=_sampling(body, logprobs),
        unset=frozenset(name for name in RANGES if getattr(body, name) is None),
        seed=_in_range("seed", body.seed, -MAX_SEED - 1, MAX_SEED),
        max_tokens=limit,
        n=_in_range("n", body.n, 1, MAX_CHOICES) or 1,
        stop=_stops(body.stop),
        include_stop=bool(body.include_stop_str_in_output),
        deadline_s=options.deadline_s if options else None,
        tenant=tenant,
        request_id=request_id,
        retries=retries,
        policy=(options.policy or "") if options else "",
        priority=_in_range("priority", body.priority, -MAX_PRIORITY, MAX_PRIORITY) or 0,
    )


def _sampling(body: GenerationBody, logprobs: int | None) -> SamplingParams:
    neutral = SamplingParams()
    checked = {
        "temperature": _in_range("temperature", body.temperature, 0.0, 2.0),
        "top_p": _in_range("top_p", body.top_p, 0.0, 1.0, above_low=True),
        "min_p": _in_range("min_p", body.min_p, 0.0, 1.0),
        "top_k": _in_range("top_k", body.top_k, -1, MAX_TOKEN_ID),
        "min_tokens": _in_range("min_tokens", body.min_tokens, 0, MAX_TOKEN_ID),
        "presence_penalty": _in_range("presence_penalty", body.presence_penalty, -2.0, 2.0),
        "frequency_penalty": _in_range("frequency_penalty", body.frequency_penalty, -2.0, 2.0),
        "repetition_penalty": _in_range("repetition_penalty", body.repetition_penalty, 0.0, 10.0, above_low=True),
        "ignore_eos": body.ignore_eos,
        "logit_bias": _biases(body.logit_bias),
        "stop_token_ids": _token_ids("stop_token_ids", body.stop_token_ids),
        "logprobs": logprobs,
        "grammar": parse_grammar(body),
    }
    if checked["top_k"] == -1:  # vLLM's "all"
        checked["top_k"] = neutral.top_k
    return msgspec.structs.replace(neutral, **{name: value for name, value in checked.items() if value is not None})


Number = TypeVar("Number", int, float)


def _in_range(param: str, value: Number | None, low: Number, high: Number, *, above_low: bool = False) -> Number | None:
    """`value` if it lies in [low, high], or in (low, high] with `above_low`; NaN lies nowhere."""
    if value is None or (low < value <= high if above_low else low <= value <= high):
        return value
    expected = f"a number above {low} and up to {high}" if above_low else f"a number from {low} to {high}"
    raise unexpected_field(expected, value, param)


def _biases(biases: Mapping[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    if len(biases) > MAX_BIASES:
        raise BadRequest(f"logit_bias: expected at most {MAX_BIASES} tokens, got {len(biases)}", "logit_bias")
    checked = {}
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) <= MAX_TOKEN_ID):
            raise unexpected_field("token ids as keys", token, "logit_bias")
        checked[int(token)] = float(_in_range(f"logit_bias.{token}", bias, -100.0, 100.0) or 0.0)
    return checked


def _token_ids(param: str, ids: list[int] | None) -> tuple[int, ...] | None:
    for extreme in (min(ids), max(ids)) if ids else ():  # a prompt may have millions of them
        _in_range(param, extreme, 0, MAX_TOKEN_ID)
    return tuple(ids) if ids is not None else None


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop: expected at most {MAX_STOPS} strings, got {len(stops)}", "stop")
    if any(not 1 <= len(text) <= MAX_STOP_CHARS for text in stops):
        raise BadRequest(f"stop: expected strings of 1 to {MAX_STOP_CHARS} characters", "stop")
    return stops


def _top_logprobs(body: ChatBody) -> int | None:
    top = _in_range("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if top is not None and not body.logprobs:
        raise BadRequest("top_logprobs: needs logprobs true", "top_logprobs")
    return (top or 0) if body.logprobs else None


def _prompts(prompt: str | list[int | str | list[int]]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequest("prompt: expected a text, token ids, or a list of either, got an empty list", "prompt")
    tokens = [item for item in prompt if isinstance(item, int)]
    if len(tokens) == len(prompt):
        return [_token_ids("prompt", tokens) or ()]
    if len(prompt) > MAX_PROMPTS:
        raise BadRequest(f"prompt: expected at most {MAX_PROMPTS} prompts, got {len(prompt)}", "prompt")
    prompts: list[str | tuple[int, ...]] = []
    for index, item in enumerate(prompt):
        if isinstance(item, int) or item == []:
            raise unexpected_field("a text or a list of token ids", item, f"prompt[{index}]")
        prompts.append(item if isinstance(item, str) else _token_ids(f"prompt[{index}]", item) or ())
    return prompts


def _retrieval(body: ChatBody) -> Retrieval | None:
    if body.mesh is None or body.mesh.store is None:
        return None
    if not body.mesh.store:
        raise BadRequest("mesh.store: expected a store's name or id, got an empty text", "mesh.store")
    top_k = _in_range("mesh.top_k", body.mesh.top_k, 1, MAX_PASSAGES)
    return Retrieval(body.mesh.store) if top_k is None else Retrieval(body.mesh.store, top_k)


def _refuse_unsupported(fields: Mapping[str, object]) -> None:
    for name, neutral in UNSUPPORTED.items():
        if fields.get(name) not in neutral:
            raise BadRequest(f"{name}: not supported here; leave it out", name)
