"""A model's text side: its tokenizer and chat template, on every node that takes requests for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mesh.errors import BadRequest
from node.text.sampling_defaults import end_tokens, generation_config, sampling_defaults


@dataclass(frozen=True)
class ModelText:
    """Prompt to tokens and back. All methods are pure; `encode*` of a long prompt takes milliseconds: call them in a thread."""

    tokenizer: Any  # transformers' PreTrainedTokenizerFast
    end_tokens: tuple[int, ...]  # end-of-sequence ids, from the generation config and the tokenizer
    vocab_size: int
    sampling_defaults: Mapping[str, float | int] = field(default_factory=dict)  # what the generation config sets

    @classmethod
    def load(cls, directory: Path) -> ModelText:
        """Reads tokenizer and generation config (*blocking*, a second the first time).

        Raises:
            BadRequest: no tokenizer there, or it cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # damaged files raise whatever the parser of their format does
            raise _no_tokenizer(directory, error) from error
        config = generation_config(directory)
        own = (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()
        ids = tuple(sorted({*own, *end_tokens(config)}))
        return cls(tokenizer, ids, len(tokenizer), sampling_defaults(config, directory.name))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: how far a text of many characters may shrink."""
        return max(map(len, self.tokenizer.get_vocab()))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    @property
    def template(self) -> str:
        """The chat template; all of them where there are several. Empty where the model has none."""
        template = self.tokenizer.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] | None = None
    ) -> tuple[int, ...]:
        """The conversation through the model's own chat template, ready for the assistant's turn.

        Raises:
            BadRequest: the template refuses the messages, or the model has none.
        """
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise BadRequest("this model has no chat template; use /v1/completions", "messages")
        try:
            encoded = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            raise BadRequest(f"the model's chat template refuses these messages: {_first_line(error)}", "messages") from None
        return tuple(encoded["input_ids"])

    def special_id(self, text: str) -> int | None:
        """The special token that is `text`: one that `decode` leaves out."""
        token = self.tokenizer.get_added_vocab().get(text) if text else None
        return token if token in self.tokenizer.all_special_ids else None

    def decode_with(self, kept: frozenset[int]) -> Callable[[Sequence[int]], str]:
        """`decode`, but the special tokens `kept` are text."""
        if not kept:
            return self.decode
        left_out = frozenset(self.tokenizer.all_special_ids) - kept

        def decode(tokens: Sequence[int]) -> str:
            shown = [token for token in tokens if token not in left_out]
            return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

        return decode

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def _no_tokenizer(directory: Path, error: Exception) -> BadRequest:
    if any((directory / name).is_file() for name in TOKENIZER_FILES):
        why = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"the tokenizer of {directory.name} cannot be read: {why}"
    else:
        reason = f"{directory.name} holds no tokenizer: expected tokenizer.json, or {', '.join(TOKENIZER_FILES[1:])}"
    remedy = "copy its files from where the model came from, or save it there with tokenizer.save_pretrained"
    return BadRequest(f"{reason}; {remedy}", "model", "model_not_servable")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
