"""The default model `mesh-demo`: small; trained if the package ships it trained, else of random weights made on the spot.

`python -m tools.default_model.train` trains one; its directory, put into the package as `TRAINED`, is what everybody gets then.
The random one lets anyone try the mesh with nothing to download: Llama-shaped, 6 layers, 256 wide. It has learned nothing, so
its answers are noise; what it shows is the mesh. Its weights are the same bytes on every machine: Philox counters, integer
arithmetic and one exact scaling, so no CPU's rounding can make two nodes differ. Its tokenizer, a byte-level BPE of 2,048
tokens, was trained once on the docstrings of CPython 3.11's standard library (PSF licence) and is part of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from node.engine.default_shape import LAYERS, MAX_MODEL_LEN, MODEL_ID

SEED = 20_261_121
END_OF_TEXT, TURN_START, TURN_END = 0, 1, 2  # token numbers in tokenizer.json
SOURCE = Path(__file__).with_name("mesh_demo")
TRAINED = SOURCE / "trained"

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


def ensure_default_model(cache_dir: Path, trained: Path = TRAINED) -> Path:
    """The trained model's directory where the package has one, else the random one's under `cache_dir`."""
    return trained if (trained / "config.json").is_file() else ensure_random_model(cache_dir)


def ensure_random_model(cache_dir: Path) -> Path:
    """The directory of the random model under `cache_dir`, made first if it is not there; takes about a second.

    Several nodes may do this at once: each writes aside and renames, and the first one's directory stays.
    """
    cache_dir /= _recipe()
    wanted = cache_dir / MODEL_ID
    if (wanted / "config.json").is_file():
        return wanted
    cache_dir.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{MODEL_ID}-", dir=cache_dir))
    try:
        _write(aside)
        aside.chmod(0o755)
        try:
            os.rename(aside, wanted)
        except OSError:
            if not (wanted / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return wanted


def _recipe() -> str:
    """Names what the random model is made of: another release's model is never taken for this one's."""
    parts = (str(SEED), CHAT_TEMPLATE, repr(_config().to_dict()), (SOURCE / "tokenizer.json").read_text())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=4).hexdigest()


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
    shutil.copyfile(SOURCE / "tokenizer.json", directory / "tokenizer.json")
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
