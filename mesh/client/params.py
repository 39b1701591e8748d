"""The parameters of a generation, by name: an unknown keyword argument is an error.

Nodes ignore unknown fields of a body, as OpenAI's clients need it; in the client a misspelt keyword argument raises TypeError at
once. Fields for another server, or for a later release, go through `extra_body`, as in the openai SDK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Final, TypedDict

EXTRA: Final = "extra_body"


class GenerateParams(TypedDict, total=False):
    """OpenAI's names, and vLLM's for its extensions. Nodes refuse the parameters of the second block, with the reason."""

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
    stream_options: Mapping[str, object] | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    min_tokens: int | None
    ignore_eos: bool | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    priority: int | None
    return_token_ids: bool | None
    response_format: Mapping[str, object] | None
    structured_outputs: Mapping[str, object] | None
    guided_json: str | Mapping[str, object] | bool | None
    guided_regex: str | None
    guided_choice: Sequence[str] | None
    guided_grammar: str | None
    mesh: Mapping[str, object] | None
    extra_body: Mapping[str, object] | None  # further fields; they replace those of the same name

    echo: bool | None
    suffix: str | None
    best_of: int | None
    use_beam_search: bool | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, object] | None
    continue_final_message: bool | None
    add_generation_prompt: bool | None
    add_special_tokens: bool | None
    skip_special_tokens: bool | None
    documents: Sequence[object] | None
    functions: Sequence[object] | None
    function_call: object
    modalities: Sequence[str] | None
    audio: object
    web_search_options: object
    prompt_logprobs: int | None
    prompt_embeds: object
    truncate_prompt_tokens: int | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    logits_processors: Sequence[object] | None


class ChatParams(GenerateParams, total=False):
    """The parameters of `POST /v1/chat/completions`."""

    max_completion_tokens: int | None
    tools: Sequence[Mapping[str, object]] | None
    tool_choice: str | Mapping[str, object] | None
    parallel_tool_calls: bool | None
    logprobs: bool | None
    top_logprobs: int | None


class CompletionParams(GenerateParams, total=False):
    """The parameters of `POST /v1/completions`."""

    logprobs: int | None


def fields_of(method: str, params: Mapping[str, object], known: frozenset[str]) -> dict[str, object]:
    """Returns the fields of the body for `params`.

    Raises:
        TypeError: a name that is not in `known`; the message has the nearest one that is.
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
