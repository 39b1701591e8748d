"""Whether a directory holds a checkpoint that could be served, told by the names, configs and headers of its files. No torch.

What people have and what is not served is refused here by name, with what would work, before the node takes anything up:
adapters, other formats, quantised weights, missing and damaged files. What the architecture says, `engine.checkpoint` judges.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mesh.errors import BadRequest
from node.checkpoints.quantised import REMEDY, quantisation, quantisation_of_tensors
from node.checkpoints.safetensors_header import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    is_whole,
    read_header,
    read_index,
    unreadable,
    weight_files,
)

EXPECTED = "expected a directory as save_pretrained or a hub download makes it: config.json, *.safetensors, tokenizer"
MAX_CONFIG_BYTES = 64 << 20
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MAX_NAMED = 5  # directories in one message


def require_checkpoint(directory: Path) -> dict[str, object]:
    """The config of the checkpoint in `directory`, as JSON has it.

    Raises:
        BadRequest: it is none that could be served; with the reason and what would work.
    """
    names = _names(directory)
    if "config.json" not in names:
        raise _refusal(_without_config(directory, names))
    config = _read_config(directory)
    _refuse_other_kinds(directory, names, config)
    method = quantisation(directory, config)
    if method is not None:
        raise _refusal(f"{directory.name} is quantised {method}, which is not served; {REMEDY}")
    _refuse_bad_weights(directory, names)
    return config


def _refusal(message: str) -> BadRequest:
    return BadRequest(message, param="model", code="model_not_servable")


def _names(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        raise _refusal(f"no such model directory: {directory}; {EXPECTED}") from None
    except NotADirectoryError:
        raise _refusal(f"{directory} is a file; {EXPECTED}") from None
    except OSError as error:
        raise unreadable(directory, error) from None


def _without_config(directory: Path, names: set[str]) -> str:
    """Why a directory has no config.json: what it is instead, and what would work."""
    below = sorted(name for name in names if (directory / name).is_dir())
    cached = sorted(name for name in below if name.startswith("models--"))
    models = [name for name in below if (directory / name / "config.json").is_file()]
    revision = _current_snapshot(directory)
    formats = {
        "params.json": "Meta's or Mistral's own format",
        "model_index.json": "a diffusers pipeline",
        "mlc-chat-config.json": "MLC's format",
        "openvino_model.xml": "OpenVINO's format",
    }
    other = next((said for name, said in formats.items() if name in names), None)
    gguf = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    if not names:
        return f"{directory} is empty; {EXPECTED}"
    if any(name in names for name in ADAPTER_FILES):
        return f"{directory.name} is an adapter{_base_of(directory)}, no whole model; {_merge()}"
    if revision is not None:
        return f"{directory.name} is a model's folder in the hub cache; give its snapshot: {revision}"
    if cached:
        some = ", ".join(f"{name}/snapshots/…" for name in cached[:MAX_NAMED])
        return f"{directory} is a hub cache; give the snapshot of one of its models: {some}"
    if models:
        return f"{directory} has no config.json, and {_some(models)} below it have; give one of them"
    if gguf is not None:
        return f"{directory.name} has no config.json but {gguf}: {gguf_reason()}"
    if other is not None:
        return (
            f"{directory.name} has no config.json: it is in {other}; give the same model in transformers' form, with safetensors"
        )
    return f"{directory} has no config.json; {EXPECTED}"


def gguf_reason() -> str:
    return "GGUF files are not served; give the safetensors checkpoint of the same model, if need be with --quantize int8 or int4"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _merge() -> str:
    return "adapters are not applied here; merge it into its base (peft: merge_and_unload, save_pretrained) and give the result"


def _base_of(directory: Path) -> str:
    try:
        base = json.loads((directory / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f" of {str(base)[:100]}"


def _current_snapshot(directory: Path) -> Path | None:
    """Of a model's folder in the hub cache: the snapshot that is current there."""
    snapshots = directory / "snapshots"
    try:
        commits = sorted(os.listdir(snapshots))
        main = directory / "refs" / "main"
        current = main.read_text().strip() if main.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return None
    if current not in commits:
        current = commits[-1] if commits else ""
    return snapshots / current if current else None


def _read_config(directory: Path) -> dict[str, object]:
    path = directory / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too large")
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise _refusal(f"the config.json of {directory.name} is damaged: {str(error)[:200]}; download it again") from None
    if not isinstance(config, dict):
        raise _refusal(f"the config.json of {directory.name} is damaged: expected an object; download it again")
    return config


def _refuse_other_kinds(directory: Path, names: set[str], config: dict[str, object]) -> None:
    """An adapter beside its base, or a model that makes vectors of texts."""
    adapter = next((name for name in ADAPTER_FILES if name in names), None)
    if adapter is not None:
        raise _refusal(
            f"{directory.name} has an adapter{_base_of(directory)} beside its weights ({adapter}); {_merge()}; "
            "to serve the base alone, take the adapter's files out of the directory"
        )
    if "modules.json" in names and any((directory / name).is_dir() for name in names if name.endswith("_Pooling")):
        raise _refusal(f"{directory.name} is an embedding model of sentence-transformers; only models that write text are served")
    if not isinstance(config.get("model_type"), str):
        raise _refusal(f"the config.json of {directory.name} does not say its model_type; {EXPECTED}")


def _refuse_bad_weights(directory: Path, names: set[str]) -> None:
    """Files that are missing, cut short or damaged, or whose tensors are not what they are said to be."""
    if not any(name.endswith(".safetensors") or name == INDEX for name in names):
        raise _refusal(_without_safetensors(directory, names))
    named = read_index(directory / INDEX) if WEIGHTS not in names and INDEX in names else {}
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        tensors = read_header(path)
        lacking = next((tensor for tensor, name in named.items() if name == path.name and tensor not in tensors), None)
        if lacking is not None:
            raise _refusal(f"{path.name} lacks the tensor {lacking[:100]}, which {INDEX} says it holds; download both again")
        stored |= tensors
    method = quantisation_of_tensors({name: tensor.dtype for name, tensor in stored.items()})
    if method is not None:
        raise _refusal(f"{directory.name} is quantised {method}, which is not served; {REMEDY}")
    for name, tensor in stored.items():
        if not is_whole(tensor):
            raise _refusal(
                f"tensor {name[:100]} of {directory.name} ({tensor.dtype}) has another size than its shape says; "
                "download it again"
            )


def _without_safetensors(directory: Path, names: set[str]) -> str:
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        return (
            f"{directory.name} has only pickled weights ({pickled[0]}), and unpickling runs whatever code the file holds; "
            "convert it once, where you trust it, with save_pretrained, which writes safetensors"
        )
    gguf = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    if gguf is not None:
        return f"{directory.name} has no *.safetensors files but {gguf}: {gguf_reason()}"
    return f"{directory.name} has no *.safetensors files; download the weights, or convert them with save_pretrained"
