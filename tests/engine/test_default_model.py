"""The default model of the package: its stated properties are true, and its template renders prompts as in training."""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoTokenizer

from node.engine.default_model import DIRECTORY, LAYERS, MAX_MODEL_LEN
from node.engine.model.checkpoint import read_checkpoint
from rag.context import build
from rag.types import Passage
from tools.default_model.export import MAX_BYTES, size_bytes
from tools.default_model.prompts import grounded, opening


def test_the_stated_properties_match_the_checkpoint() -> None:
    checkpoint = read_checkpoint(DIRECTORY)
    assert (checkpoint.layers, checkpoint.max_model_len) == (LAYERS, MAX_MODEL_LEN)
    assert checkpoint.end_ids == {0, 2}


def test_the_model_is_small_and_its_card_describes_it() -> None:
    assert size_bytes(DIRECTORY) <= MAX_BYTES
    card = (DIRECTORY / "README.md").read_text()
    assert "demonstration" in card and "not measured" not in card and "<<" not in card
    assert json.loads((DIRECTORY / "training.json").read_text())["train_tokens"] > 10_000_000


def test_the_template_renders_a_prompt_as_in_training() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    texts = ("One is here. Two is there.\n\n- A list\n- of two", "Three, as `code`, ends.")
    passages = [Passage("file-0", "notes.md", text, 0, len(text), 1.0) for text in texts]
    prompt = build("Where is two?", passages, budget_tokens=4096, count_tokens=len).prompt
    shown = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    assert shown == opening(grounded("Where is two?", texts))


def test_the_tokenizer_round_trips_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    for text in ("Hello, mesh!", "naïve 李白 🦊\n\n\tif x:  return", " leading and trailing ", "<|not special|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|end|>") == [tokenizer.eos_token_id] == [2]
    assert tokenizer.decode(tokenizer.encode("<|s3|>It is so. [1]<|end|>"), skip_special_tokens=True) == "It is so. [1]"


def test_the_template_renders_tools_and_their_calls() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    render: Any = tokenizer.apply_chat_template
    text: str = render(messages, tools=[tool], add_generation_prompt=True, tokenize=False)
    assert text.count("Be brief.") == 1 and text.count("<|system|>") == 1
    assert '"name": "add"' in text and '"arguments": {"a": 1}' in text
    assert text.endswith("<|end|><|user|>2<|assistant|>")
