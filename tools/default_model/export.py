"""The trained weights as a model directory that transformers and this project's engine read, with its model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tools.default_model.checkpoints import Run
from tools.default_model.model import Model
from tools.default_model.prompts import END_OF_TEXT, TURN_END
from tools.default_model.prose import Prose
from tools.default_model.vocabulary import tokenizer_config

NAME = "mesh-demo"
MAX_BYTES = 32 << 20  # all files together: they are part of the package
TEMPLATE = Path(__file__).with_name("MODEL_CARD.md")
UNMEASURED = "not measured"
_HF_NAMES = {
    "attention_norm": "input_layernorm",
    "mixer_norm": "post_attention_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def export(directory: Path, run: Run, model: Model, work: Path, stored: torch.dtype = torch.bfloat16) -> None:
    """Writes every file of the model into `directory`, whose other files stay.

    Raises:
        ValueError: more than `MAX_BYTES` in all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {_hf_name(name): each.detach().to("cpu", stored).contiguous() for name, each in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    _write_json(directory / "config.json", _config(run, stored))
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": [TURN_END, END_OF_TEXT],
            "pad_token_id": END_OF_TEXT,
            "do_sample": False,
        },
    )
    shutil.copyfile(work / "tokenizer.json", directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(tokenizer_config(run.shape.context), encoding="utf-8")
    prose = Prose.load(work / "prose.json")
    facts = {
        "parameters": run.shape.parameters,
        "train_tokens": run.tokens,
        "train_answer_tokens": run.answer_tokens,
        "train_seconds": round(run.seconds),
        "train_steps": run.steps,
        "step_tokens": run.step_tokens,
        "seed": run.seed,
        "device": run.device,
        "torch": torch.__version__,
        "stored": str(stored).removeprefix("torch."),
        "sources": [[each.name, each.licence, each.paragraphs, each.characters] for each in prose.sources],
    }
    _write_json(directory / "training.json", facts)
    write_card(directory, None)
    if (size := size_bytes(directory)) > MAX_BYTES:
        raise ValueError(f"{directory} has {size} bytes; at most {MAX_BYTES} fit into the package: a smaller shape or type")


def write_card(directory: Path, figures: dict[str, Any] | None) -> None:
    """Fills the model card's template from `training.json` and, once measured, the evaluation's figures."""
    facts = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    rows = [
        f"| {name} | {licence} | {paragraphs:,} | {characters:,} |" for name, licence, paragraphs, characters in facts["sources"]
    ]
    fields = facts | {
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "vocabulary": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "sources": "\n".join(rows),
        "figures": _figure_rows(figures),
    }
    card = TEMPLATE.read_text(encoding="utf-8")
    for name, value in fields.items():
        card = card.replace(f"<<{name}>>", f"{value:,}" if isinstance(value, int) and name != "seed" else str(value))
    (directory / "README.md").write_text(card, encoding="utf-8")


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def load_into(model: Model, directory: Path) -> None:
    """The reverse of `export`, for tests and for going on from a shipped model: weights only."""
    from safetensors.torch import load_file

    stored = load_file(directory / "model.safetensors")
    model.load_state_dict({name: stored[_hf_name(name)].float() for name in model.state_dict()})


def _figure_rows(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return f"| all | {UNMEASURED} | |"
    baseline = figures.get("baseline", {})
    keys = ("world_exact", "world_cited", "unanswerable_refused", "xquad_sentence", "docs_sentence")
    return "\n".join(f"| `{key}` | {_shown(figures.get(key))} | {_shown(baseline.get(key))} |" for key in keys)


def _shown(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:.3f}"


def _hf_name(name: str) -> str:
    match name.split("."):
        case ["embedding"]:
            return "model.embed_tokens.weight"
        case ["norm"]:
            return "model.norm.weight"
        case ["layers", number, part]:
            return f"model.layers.{number}.{_HF_NAMES[part]}.weight"
    raise ValueError(f"no such parameter: {name}")


def _config(run: Run, stored: torch.dtype) -> dict[str, Any]:
    shape = run.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": TURN_END,
        "pad_token_id": END_OF_TEXT,
        "dtype": str(stored).removeprefix("torch."),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
