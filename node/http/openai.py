"""OpenAI's generation requests, checked, as `GenerateRequest`s. Pure.

What would change the meaning of an answer and is not supported is refused with the field's name; unknown
harmless fields are ignored. A field that is `null` counts as absent, as the official clients send it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from mesh.errors import BadRequest
from mesh.ids import ModelId, StreamId
from node.http.errors import unexpected_field
from node.http.messages import parse_messages
from node.http.schema import ChatBody, CompletionBody, GenerationBody
from node.http.structured import parse_grammar
from node.http.tools import parse_tools
from node.requests import GenerateRequest, Retrieval, SamplingParams, ToolUse
from node.text.sampling_defaults import RANGES

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

NEUTRAL_OFF: tuple[Any, ...] = (None, False)
NEUTRAL_EMPTY: tuple[Any, ...] = (None, [], {}, "")
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
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


def decode_body(raw: bytes, kind: type[Body]) -> tuple[Body, dict[str, Any]]:
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


def _with_special_floats(raw: bytes, error: Exception) -> Any:
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


def parse_chat(raw: bytes, id: StreamId, *, tenant: str = "", request_id: str = "") -> ParsedRequest:
    """A body of `POST /v1/chat/completions`. Raises BadRequest."""
    body, fields = decode_body(raw, ChatBody)
    _refuse_unsupported(fields)
    logprobs = _top_logprobs(body)
    limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    base = _base_request(body, id, limit, limit_name, logprobs, tenant, request_id)
    tools = parse_tools(body)
    if tools is not None and tools.forced and base.sampling.grammar is not None:
        asked = base.sampling.grammar.param
        raise BadRequest(f"{asked}: tool_choice says already what the answer must be", asked)
    request = replace(base, messages=parse_messages(body.messages), retrieval=_retrieval(body), tools=tools)
    return _asked(body, id, (request,), chat=True)


def parse_completion(raw: bytes, id: StreamId, *, tenant: str = "", request_id: str = "") -> ParsedRequest:
    """A body of `POST /v1/completions`. Raises BadRequest."""
    body, fields = decode_body(raw, CompletionBody)
    _refuse_unsupported(fields)
    if body.mesh is not None and body.mesh.store is not None:
        raise BadRequest("mesh.store: retrieval needs messages; ask /v1/chat/completions", "mesh.store")
    logprobs = _in_range("logprobs", body.logprobs, 0, MAX_TOP_LOGPROBS)
    base = _base_request(body, id, body.max_tokens, "max_tokens", logprobs, tenant, request_id)
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


def _prompts(prompt: str | list[Any]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequest("prompt: expected a text, token ids, or a list of either, got an empty list", "prompt")
    if all(isinstance(item, int) for item in prompt):
        return [_token_ids("prompt", prompt) or ()]
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


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name, neutral in UNSUPPORTED.items():
        if fields.get(name) not in neutral:
            raise BadRequest(f"{name}: not supported here; leave it out", name)
