"""A model of random weights, Llama-shaped, 6 layers, 256 wide, with a tokenizer and a chat template: for tests of exactness.

Its weights are the same bytes on every machine: Philox counters, integer arithmetic and one exact scaling, so no CPU's
rounding can make two differ. Its tokenizer, a byte-level BPE of 2,048 tokens, was trained once on the docstrings of CPython
3.11's standard library (PSF licence).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

SEED = 20_261_121
END_OF_TEXT, TURN_START, TURN_END = 0, 1, 2  # token numbers
TOKENIZER = Path(__file__).with_name("random_tokenizer.json")
LAYERS, MAX_MODEL_LEN = 6, 4096

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Tools you may call, one JSON object each:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- 'To call one, answer with {"name": NAME, "arguments": OBJECT}.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def make_random_model(directory: Path) -> Path:
    """Writes the model into `directory`, which is made; takes about a second."""
    directory.mkdir(parents=True)
    _write(directory)
    return directory


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_MODEL_LEN,
        rms_norm_eps=1e-5,
        bos_token_id=END_OF_TEXT,
        eos_token_id=TURN_END,
        pad_token_id=END_OF_TEXT,
        tie_word_embeddings=False,
        dtype="float32",
    )


def _write(directory: Path) -> None:
    config = _config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    _fill(model)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT, eos_token_id=[TURN_END, END_OF_TEXT], pad_token_id=END_OF_TEXT, do_sample=True
    )
    model.save_pretrained(directory)
    shutil.copyfile(TOKENIZER, directory / "tokenizer.json")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def _fill(model: nn.Module) -> None:
    """Norms to one; matrices to sums of four 16-bit numbers, scaled by a power of two: bell-shaped and exact.

    Their standard deviation is 0.07, about 1 / sqrt(256), so activations keep their size from layer to layer; the head's
    is 0.29, which spreads the logits to about 4.6: some tokens are clearly likelier than others.
    """
    with torch.no_grad():
        for number, (name, tensor) in enumerate(sorted(model.named_parameters())):
            if tensor.dim() == 1:
                tensor.fill_(1.0)
                continue
            raw = np.random.Philox(key=SEED, counter=[0, 0, 0, number]).random_raw(tensor.numel())
            quarters = np.ascontiguousarray(raw.astype("<u8")).view("<u2").reshape(-1, 4)
            sums = quarters.sum(axis=1, dtype=np.int64) - 2 * 65535
            scale = 2.0**-17 if name.startswith("lm_head") else 2.0**-19
            values = (sums * scale).astype(np.float32)  # 18-bit integers times a power of two: exact
            tensor.copy_(torch.from_numpy(values).view_as(tensor))
