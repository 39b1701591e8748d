"""A request for text as the entry node understands it, and the events that answer it.

HTTP makes a `GenerateRequest` and turns `GenerateEvent`s into chunks; nothing here knows HTTP,
torch or the network. All validation that needs no model has happened before one of these exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from mesh.ids import ModelId, NodeId, StreamId


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must be. Part of the request, so every node that draws a token for it has it."""

    kind: Literal["json", "regex", "choice", "lark"]
    source: str  # a JSON schema; a regular expression; the choices as a JSON list of texts; a Lark grammar
    lenient: bool = False  # a schema's keywords that cannot be enforced are passed over, not refused
    param: str = "response_format"  # the field it came from, for errors


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is drawn. The noise depends on (seed, position) alone, so any node can continue.

    Neutral values switch a term off: temperature 0 is greedy, top_k 0, top_p 1, min_p 0, penalties 0
    (repetition 1). `max_tokens` and `seed` are always set by the time an engine sees this.
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
    """Put passages of a document store in front of the question."""

    store: str
    top_k: int = 5


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Functions that the answer may call. `tools` are in OpenAI's form, checked."""

    tools: tuple[dict[str, Any], ...]
    choice: Literal["auto", "none", "required"] = "auto"
    named: str | None = None  # the one function that must be called; `choice` is then "required"
    parallel: bool = True  # more than one call in an answer

    @property
    def forced(self) -> bool:
        return self.choice == "required"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(str(tool["function"]["name"]) for tool in self.tools)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Exactly one of `messages`, `prompt`, `prompt_ids` is set."""

    id: StreamId
    model: ModelId | None  # None: the only or default model
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    unset: frozenset[str] = frozenset()  # fields of `sampling` that the client left to the model
    seed: int | None = None  # None: the entry draws one and tells it
    max_tokens: int | None = None  # None: to the end of the context
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
    """New text of one choice. `seq` counts the tokens of the stream, over all choices, whose text is out with this event."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    seq: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDone:
    """`token_ids`: those that brought no text before the end (an end-of-sequence token), counted by `seq` here."""

    choice: int
    finish_reason: str  # "stop" | "length"
    seq: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageUse:
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
    """Always the first event: what the entry settled before any token."""

    model: ModelId
    seed: int
    prompt_tokens: int
    tool_style: str = ""  # how the model writes tool calls (`node.text.tool_styles`), where tools were offered


@dataclass(frozen=True, slots=True)
class Finished:
    """Always the last event of a generation that did not fail."""

    seq: int
    prompt_tokens: int
    completion_tokens: int
    seed: int
    numerics: str  # "exact" | "approximate"
    attempts: int
    path: tuple[StageUse, ...]
    retrieval: RetrievalReport | None = None
    cached_tokens: int = 0  # of the prompt, that the first attempt found computed


GenerateEvent = Started | TextDelta | ChoiceDone | Finished
