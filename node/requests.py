"""A request for text as the entry takes it, and the events that answer it.

HTTP makes a `GenerateRequest` and turns `GenerateEvent`s into chunks; this module is independent of HTTP, torch and the network.
A `GenerateRequest` has passed all validation that needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from mesh.ids import ModelId, NodeId, StreamId


class Grammar(msgspec.Struct, frozen=True):
    """The grammar that an answer must match. Part of the request, so that every node that draws a token for it has it."""

    kind: Literal["json", "regex", "choice", "lark"]
    source: str  # a JSON schema; a regular expression; the choices as a JSON list of texts; a Lark grammar
    lenient: bool = False  # ignores a schema's keywords that cannot be enforced, instead of refusing them
    param: str = "response_format"  # the field of the request that it came from, for errors


class SamplingParams(msgspec.Struct, frozen=True):
    """How tokens are drawn. The noise depends on seed and position alone, so that any node can continue an answer.

    Neutral values switch a term off: temperature 0 is greedy; top_k 0, top_p 1, min_p 0, penalties 0 (repetition 1) have no
    effect. The entry sets `max_tokens` and `seed` before an engine gets this.
    """

    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # the model's own end tokens are added by the entry
    grammar: Grammar | None = None
    logprobs: int | None = None  # how many alternatives to report beside the drawn token; None: no logprobs


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Asks for passages of a document store in front of the question."""

    store: str
    top_k: int = 5


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Functions that the answer may call. `tools` are in OpenAI's form, checked."""

    tools: tuple[Mapping[str, object], ...]
    choice: Literal["auto", "none", "required"] = "auto"
    named: str | None = None  # the one function that must be called; `choice` is then "required"
    parallel: bool = True  # more than one call in an answer

    @property
    def forced(self) -> bool:
        return self.choice == "required"

    @property
    def functions(self) -> tuple[Mapping[str, object], ...]:
        """The functions' descriptions: name, description, parameters."""
        return tuple(function for tool in self.tools if isinstance(function := tool["function"], Mapping))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(str(function["name"]) for function in self.functions)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Exactly one of `messages`, `prompt`, `prompt_ids` is set."""

    id: StreamId
    model: ModelId | None  # None: the only or default model
    messages: tuple[Mapping[str, object], ...] | None = None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    unset: frozenset[str] = frozenset()  # fields of `sampling` that the client left to the model
    seed: int | None = None  # None: the entry draws a seed and reports it
    max_tokens: int | None = None  # None: up to the end of the context
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    retrieval: Retrieval | None = None
    tools: ToolUse | None = None
    deadline_s: float | None = None  # seconds from now; None: the node's default
    tenant: str = ""
    request_id: str = ""  # x-request-id
    policy: str = ""  # routing policy; empty: the node's default
    priority: int = 0  # lower goes first, as in vLLM
    retries: int = 0  # how often the client has come back after a refusal, as it says itself


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()  # (token id, text, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice. `seq`: tokens of the stream, over all choices, whose text has been sent with this event."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    seq: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDone:
    """The end of one choice. `token_ids`: tokens at the end without text (an end-of-sequence token), counted in `seq` here."""

    choice: int
    finish_reason: str  # "stop" | "length"
    seq: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageUse:
    """One stage of the last attempt's path."""

    node: NodeId
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Citation:
    """`[number]` in the text stands for this passage."""

    number: int
    file_id: str
    filename: str
    quote: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    store: str
    digest: str
    shards_ok: int
    shards_total: int
    citations: tuple[Citation, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """Always the first event: what the entry has decided before the first token."""

    model: ModelId
    seed: int
    prompt_tokens: int
    tool_style: str = ""  # how the model writes tool calls (`node.text.tool_styles`), where tools were offered


@dataclass(frozen=True, slots=True)
class Finished:
    """Always the last event of a request that has not failed."""

    seq: int
    prompt_tokens: int
    completion_tokens: int
    seed: int
    numerics: str  # "exact" | "approximate"
    attempts: int
    path: tuple[StageUse, ...]
    retrieval: RetrievalReport | None = None
    cached_tokens: int = 0  # tokens of the prompt that the first attempt found in caches


GenerateEvent = Started | TextDelta | ChoiceDone | Finished
