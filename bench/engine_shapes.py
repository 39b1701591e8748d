"""The models that bench.engine measures on: Llama-shaped, random weights stored in bfloat16, and prompts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

PROMPT_TOKENS = 16  # of each sequence that is decoded: 32 such prompts take a side as long to read as one of 512 tokens
COMMON: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "100M": {
        "vocab_size": 16_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}


def make_checkpoint(directory: Path, shape: dict[str, Any]) -> None:
    """Writes the model's config and its weights, the same at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(**COMMON, **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def layer_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a decoder layer's products, those of the same input as one, in the order of a step."""
    hidden, middle, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    dim = hidden // heads
    return {
        "qkv": (hidden, dim * (heads + 2 * shape["num_key_value_heads"])),
        "out": (heads * dim, hidden),
        "gate_up": (hidden, 2 * middle),
        "down": (middle, hidden),
    }


def weights_read_bytes(config: Any, weight_bytes: int) -> int:
    """What one decoding step must read: all weights but the embedding, of which it looks up rows. Norms are left out."""
    dim = config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    total: int = weight_bytes * (config.num_hidden_layers * layer + config.vocab_size * config.hidden_size)
    return total


def prompts(batch: int, vocab_size: int, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """`batch` prompts of so many tokens; the first ones are the same in every batch."""
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (tokens,), generator=numbers).tolist() for _ in range(batch)]
