"""The random model of the tests: the same bytes everywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from node.engine.model.checkpoint import read_checkpoint

WEIGHTS_SHA256 = "4a4d52fdf7bb23d8"


def test_its_weights_are_pinned_to_the_byte(random_model: Path) -> None:
    assert hashlib.sha256((random_model / "model.safetensors").read_bytes()).hexdigest().startswith(WEIGHTS_SHA256)


def test_it_is_what_the_manual_says(random_model: Path) -> None:
    checkpoint = read_checkpoint(random_model)
    assert (checkpoint.layers, checkpoint.hidden_size, checkpoint.max_model_len) == (6, 256, 4096)
    assert checkpoint.config.num_attention_heads == 8 and checkpoint.config.num_key_value_heads == 4
    assert checkpoint.end_ids == {0, 2}


def test_its_tokenizer_gives_back_any_text_and_knows_chat(random_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    for text in ("Hello, mesh!", "naïve 李白 🦊\n\n\tif x:  return", " leading and trailing ", "<|not special|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 2048
    assert len(tokenizer.encode("the function returns a list of names")) <= 9
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]


def test_the_template_renders_tools_and_their_calls(random_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_model)
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
    assert text.count("Be brief.") == 1 and text.count("<|im_start|>system") == 1
    assert '"name": "add"' in text and '"arguments": {"a": 1}' in text
    assert text.endswith("<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n")
