"""The bodies that clients send, as msgspec structs: types only, ranges are checked in `openai`.

Field names are OpenAI's, and vLLM's for its extras. Unknown fields are ignored; those that would change the
meaning of an answer and are not supported are listed in `openai.UNSUPPORTED`. `/openapi.json` is made from these.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.json_object import JsonObject


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class MeshOptions(msgspec.Struct, kw_only=True):
    """`store` and `top_k`: put passages of a document store in front of the question."""

    store: str | None = None
    top_k: int | None = None
    deadline_s: float | None = None
    policy: str | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's: at most one of them."""

    json: str | JsonObject | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """What chat and plain completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = None
    return_token_ids: bool | None = None
    response_format: JsonObject | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | JsonObject | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # the mesh's
    mesh: MeshOptions | None = None


class ChatBody(GenerationBody, kw_only=True):
    messages: list[JsonObject]
    max_completion_tokens: int | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[int | str | list[int]]  # one text, one list of token ids, or a list of either
    logprobs: int | None = None


class EmbeddingBody(msgspec.Struct, kw_only=True):
    input: str | list[str | int]  # a text or texts; token ids are recognised to be refused by name
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None


class StoreBody(msgspec.Struct, kw_only=True):
    name: str | None = None
    file_ids: list[str] | None = None
    metadata: JsonObject | None = None


class AttachBody(msgspec.Struct, kw_only=True):
    file_id: str
    attributes: JsonObject | None = None


class HybridSearch(msgspec.Struct, kw_only=True):
    embedding_weight: float = 1.0
    text_weight: float = 1.0


class RankingOptions(msgspec.Struct, kw_only=True):
    ranker: str | None = None
    score_threshold: float | None = None
    hybrid_search: HybridSearch | None = None


class SearchBody(msgspec.Struct, kw_only=True):
    query: str | list[str]
    max_num_results: int | None = None
    ranking_options: RankingOptions | None = None
