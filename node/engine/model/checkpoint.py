"""Reads a model directory without its weights: decides whether it can be served, and finds what peers must know of it.

Only local directories, only safetensors, never code from the checkpoint. A model that cannot be served exactly is refused
with its name and the reason, before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mesh.errors import BadRequest
from node.checkpoints.model_directory import require_checkpoint
from node.checkpoints.safetensors_header import read_header, weight_files
from node.weights.identity import identity_of

KNOWN_GOOD = (
    "llama, qwen2, qwen3, mistral, mixtral, gemma, gemma2, gemma3_text, phi3, gpt2, gpt_neox, opt, olmo2, granite or cohere"
)
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
STATEFUL_FIELDS = ("linear_num_value_heads", "mamba_d_state", "ssm_cfg", "state_size", "conv_L_cache", "time_step_rank")
MULTIMODAL_FIELDS = ("vision_config", "audio_config", "text_config")  # in configs of models of images or audio
# Families whose causal class attends to later positions unless `is_decoder` is set in their config.
ENCODERS = {"bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "data2vec-text", "roformer", "ernie"}
ENCODERS |= {"bert-generation", "megatron-bert", "rembert", "roberta-prelayernorm", "big_bird", "xmod"}


@dataclass(frozen=True)
class Checkpoint:
    """A servable model, as its config describes it."""

    directory: Path
    config: PretrainedConfig
    model_class: type
    layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    stored_dtype: torch.dtype
    end_ids: frozenset[int]  # the model's own end-of-sequence tokens
    tied: bool  # the head is the embedding
    mixture: bool  # has mixture-of-experts layers
    known_identity: str = ""  # empty: not known yet

    @cached_property
    def weights(self) -> str:
        """The identity of the checkpoint (`mesh.manifest`); *blocking* where it is not known yet: every byte is hashed."""
        return self.known_identity or identity_of(self.directory)


def read_checkpoint(directory: Path, weights: str = "") -> Checkpoint:
    """Reads a checkpoint's config and checks that the model can be served. `weights`: its identity, where it is known.

    Raises:
        BadRequest: it cannot be served; with the reason and what would work.
    """
    raw = require_checkpoint(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise _refusal(f"{_why_no_config(directory, raw, error)}; a {KNOWN_GOOD} checkpoint would work") from error
    model_class = _model_class(directory, config)
    _refuse_inexact(directory, config)
    files = weight_files(directory)
    layers, max_model_len = config.num_hidden_layers, _max_model_len(config)
    return Checkpoint(
        directory=directory,
        config=config,
        model_class=model_class,
        layers=layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        stored_dtype=_stored_dtype(config, files[0]),
        end_ids=_end_ids(directory, config),
        tied=bool(config_value(config, "tie_word_embeddings")),
        mixture=any(config_value(config, name) for name in ("num_local_experts", "num_experts", "n_routed_experts")),
        known_identity=weights,
    )


def config_value(config: PretrainedConfig, name: str, default: object = None) -> Any:
    """Returns a field of the config; `default` where it is missing, or where each layer has its own value."""
    try:
        return getattr(config, name, default)
    except AmbiguousGlobalPerLayerAttributeError:
        return default


def _refusal(message: str) -> BadRequest:
    return BadRequest(message, param="model", code="model_not_servable")


def _why_no_config(directory: Path, raw: dict[str, object], error: Exception) -> str:
    """Returns why transformers cannot make a config of the file."""
    kind = str(raw.get("model_type"))[:100]
    if kind not in CONFIG_MAPPING_NAMES:
        code = ", and the Python code in its directory is never run" if raw.get("auto_map") else ""
        return f"{directory.name} is {kind}, an architecture that transformers {transformers.__version__} does not have{code}"
    return f"the config of {directory.name} ({kind}) cannot be read: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _model_class(directory: Path, config: PretrainedConfig) -> type:
    kind = config.model_type
    if config_value(config, "is_encoder_decoder"):
        raise _refusal(
            f"{directory.name} is {kind}, an encoder-decoder; only causal language models are served, e.g. {KNOWN_GOOD}"
        )
    if kind in ENCODERS and not config_value(config, "is_decoder"):
        raise _refusal(f"{directory.name} is {kind} set up as an encoder, which looks ahead; try {KNOWN_GOOD}")
    declared = list(config_value(config, "architectures") or [])
    causal = [name for name in declared if name.endswith(("ForCausalLM", "LMHeadModel"))]
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        model_class = None
    if model_class is None or (declared and not causal):
        what = ", ".join(declared) or kind
        _refuse_multimodal(directory, config, what)
        raise _refusal(f"{directory.name} is {what}, not a causal language model; a {KNOWN_GOOD} checkpoint would work")
    chosen = model_class[0] if isinstance(model_class, tuple) else model_class
    assert isinstance(chosen, type)
    return chosen


def _refuse_multimodal(directory: Path, config: PretrainedConfig, what: str) -> None:
    other = next((part for part in MULTIMODAL_FIELDS if config_value(config, part) is not None), None)
    if other is not None:
        more = f"a model of more than text ({other}); only models of text are served"
        raise _refusal(f"{directory.name} is {what}, {more}, e.g. {KNOWN_GOOD}")


def _refuse_inexact(directory: Path, config: PretrainedConfig) -> None:
    kind, name = config.model_type, directory.name
    if config_value(config, "attention_chunk_size") or "chunked_attention" in (config_value(config, "layer_types") or []):
        raise _refusal(f"{name} is {kind}, whose attention is cut into chunks, which we do not compute; try {KNOWN_GOOD}")
    stateful = sorted({str(layer) for layer in config_value(config, "layer_types") or []} - ATTENTION_LAYERS)
    stateful += [field for field in STATEFUL_FIELDS if config_value(config, field) is not None]
    if stateful:
        raise _refusal(
            f"{name} is {kind}, a hybrid with layers that carry a state other than keys and values ({', '.join(stateful)}); "
            f"only pure attention models are served, e.g. {KNOWN_GOOD}"
        )
    if _rope_type(config) == "dynamic":
        raise _refusal(f"{name} uses dynamic NTK rotary scaling, which makes a token depend on its batch; try {KNOWN_GOOD}")
    if config_value(config, "alibi"):
        raise _refusal(f"{name} is {kind} with ALiBi, positions that are biases of attention scores; try {KNOWN_GOOD}")
    missing = [field for field in ("num_hidden_layers", "hidden_size", "vocab_size") if not config_value(config, field)]
    if missing:
        _refuse_multimodal(directory, config, kind)
        raise _refusal(f"the config of {name} ({kind}) has no {', '.join(missing)}; a {KNOWN_GOOD} checkpoint would work")


def sliding_window(config: PretrainedConfig, start: int, end: int) -> int | None:
    """Returns the sliding window, in positions, of those layers in `[start, end)` that have one; None where none has."""
    window = config_value(config, "sliding_window")
    kinds = config_value(config, "layer_types")
    if not window or (kinds is None and not getattr(config, "use_sliding_window", True)):
        return None
    return int(window) if kinds is None or "sliding_attention" in kinds[start:end] else None


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    rope = config_value(config, "rope_parameters") or config_value(config, "rope_scaling")
    return rope if isinstance(rope, dict) else {}


def _rope_type(config: PretrainedConfig) -> str:
    rope = _rope(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _max_model_len(config: PretrainedConfig) -> int:
    """Returns the context in tokens, for LongRoPE that below which it uses its short factors.

    Beyond it, LongRoPE chooses its factors by the longest sequence of a batch, so a token would depend on the others.
    """
    longest = int(config_value(config, "max_position_embeddings") or config_value(config, "n_positions") or 2048)
    if _rope_type(config) == "longrope":
        original = _rope(config).get("original_max_position_embeddings")
        longest = min(longest, int(original or config_value(config, "original_max_position_embeddings") or longest))
    return longest


def _stored_dtype(config: PretrainedConfig, first_file: Path) -> torch.dtype:
    named = config_value(config, "dtype")
    if isinstance(named, torch.dtype):
        return named
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = [kinds[tensor.dtype] for tensor in read_header(first_file).values() if tensor.dtype in kinds]
    return found[0] if found else torch.float32


def _end_ids(directory: Path, config: PretrainedConfig) -> frozenset[int]:
    ids = config_value(config, "eos_token_id")
    if (directory / "generation_config.json").is_file():
        try:
            ids = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id or ids
        except (OSError, ValueError, TypeError) as error:
            raise _refusal(f"the generation config of {directory.name} cannot be read: {str(error)[:200]}") from None
    return frozenset(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
