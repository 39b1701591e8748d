"""The parameters that a client may give a generation, by name: a name that the mesh does not know is a mistake, not a wish.

Over HTTP unknown fields are ignored, as OpenAI's clients need it; of a keyword argument a person learns at once that it is
misspelt. What is meant for another server, or for a later release, goes through `extra_body`, as in the openai SDK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypedDict

EXTRA = "extra_body"


class GenerateParams(TypedDict, total=False):
    """OpenAI's names, and vLLM's for its extras; those of the second block are refused by a node, with the reason."""

    model: str | None
    n: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[str, float] | None
    user: str | None
    stream_options: Mapping[str, Any] | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    min_tokens: int | None
    ignore_eos: bool | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    priority: int | None
    return_token_ids: bool | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    guided_json: str | Mapping[str, Any] | bool | None
    guided_regex: str | None
    guided_choice: Sequence[str] | None
    guided_grammar: str | None
    mesh: Mapping[str, Any] | None
    extra_body: Mapping[str, Any] | None  # sent as it is, over what has the same name

    echo: bool | None
    suffix: str | None
    best_of: int | None
    use_beam_search: bool | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool | None
    add_generation_prompt: bool | None
    add_special_tokens: bool | None
    skip_special_tokens: bool | None
    documents: Sequence[Any] | None
    functions: Sequence[Any] | None
    function_call: Any
    modalities: Sequence[str] | None
    audio: Any
    web_search_options: Any
    prompt_logprobs: int | None
    prompt_embeds: Any
    truncate_prompt_tokens: int | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    logits_processors: Sequence[Any] | None


class ChatParams(GenerateParams, total=False):
    """Of `POST /v1/chat/completions`."""

    max_completion_tokens: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    logprobs: bool | None
    top_logprobs: int | None


class CompletionParams(GenerateParams, total=False):
    """Of `POST /v1/completions`."""

    logprobs: int | None


def fields_of(method: str, params: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The fields of the body that `params` ask for.

    Raises:
        TypeError: a name that is not `known`, with the nearest one that is.
    """
    for name in params:
        if name not in known:
            raise TypeError(_unexpected(method, name, known))
    extra = params.get(EXTRA)
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"{method}(): expected {EXTRA} to be a mapping of fields to send, got {type(extra).__name__}")
    return {**{name: value for name, value in params.items() if name != EXTRA}, **(extra or {})}


def _unexpected(method: str, name: str, known: frozenset[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    extra = f"What a node should get nevertheless goes into {EXTRA}={{…}}"
    return f"{method}() got an unexpected keyword argument {name!r}{hint} {extra}"


CHAT_PARAMS: frozenset[str] = ChatParams.__optional_keys__
COMPLETION_PARAMS: frozenset[str] = CompletionParams.__optional_keys__
