"""Tiny random checkpoints of many architectures, made once a test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.copying import teach_to_copy

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,  # 2.75 vectors: odd row counts would meet remainder loops
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # large, so that attention matters to the logits
}
WINDOWED = {"head_dim": 16, "sliding_window": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
GEMMA4 = {
    **WINDOWED,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", WINDOWED),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 2048}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {**WINDOWED, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**WINDOWED, "query_pre_attn_scalar": 16}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 176, "word_embed_proj_dim": 64}),
    "opt_narrow": ("opt", {"ffn_dim": 176, "word_embed_proj_dim": 32}),  # its embeddings are not as wide as its layers
    "bert_decoder": ("bert", {"is_decoder": True}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "smollm3": ("smollm3", {"pad_token_id": 0}),
    "glm4": ("glm4", {"head_dim": 16, "pad_token_id": 0}),
    "falcon": ("falcon", {}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 96}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "num_experts": 4}),
    "gpt_oss": ("gpt_oss", {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m2": ("minimax_m2", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "n_group": None, "topk_group": None}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 2, "topk_group": 1}),
    "jetmoe": ("jetmoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}),
    "ctrl": ("ctrl", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 2048, "dff": 176}),
    "modernbert_decoder": ("modernbert-decoder", {"global_attn_every_n_layers": 2, "local_attention": 64, "pad_token_id": 0}),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4_shared": ("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2}),  # the last layers take keys and values of others
    "bloom": ("bloom", {"n_layer": 4, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 2048}),
    "codegen": ("codegen", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 2048, "rotary_dim": 8}),
    "xglm": ("xglm", {"d_model": 64, "num_layers": 4, "attention_heads": 4, "ffn_dim": 176}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {"pad_token_id": 0}),
    "bart": (
        "bart",
        {
            "d_model": 64,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 176,
            "is_encoder_decoder": False,
            "is_decoder": True,
        },
    ),
    "roberta": ("roberta", {"is_decoder": True, "pad_token_id": 1}),
    "qwen3_next": ("qwen3_next", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("mamba", {}),
    "bert": ("bert", {}),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe", "minimax_m2", "deepseek_v2", "deepseek_v3")
WHOLE_ONLY = ("gemma4", "gemma4_shared")
NOT_SERVED: tuple[str, ...] = (
    "qwen3_next",
    "mamba",
    "bert",
    "bloom",
    "mpt",
    "codegen",
    "xglm",
    "gpt_neox_japanese",
    "diffllama",
    "doge",
)
NOT_SERVED += ("bart", "roberta")
EXACT = tuple(name for name in SHAPES if name not in (*NOT_SERVED, *WHOLE_ONLY, "jetmoe"))


def make_checkpoint(root: Path, name: str, shard: str | None = None, **changes: Any) -> Path:
    """A random checkpoint of the named shape below `root`; the same bytes for the same arguments.

    One whose name begins with "copying-" mostly continues a token by its neighbour in a cycle of seven.
    """
    kind, own = SHAPES[name.removeprefix("copying-")]
    directory = root / name
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**COMMON, **own, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if name.startswith("copying-"):
            teach_to_copy(model, period=7, layer_share=0.015)
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return directory
