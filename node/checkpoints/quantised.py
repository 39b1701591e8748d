"""By which method a checkpoint was quantised ahead of time, and what to do instead: none of these is served. No torch.

The method stands in config.json (`quantization_config` for most, `compression_config` and `quantization` for some), in a file
beside it, or shows only in the tensors. Our own rounding, `--quantize`, begins with a checkpoint that was not quantised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REMEDY = "give the unquantised checkpoint of the same model (float32, float16, bfloat16), if need be with --quantize int8 or int4"
# Names that people know the methods by; a method that is not listed is named as the config names it.
METHODS = {
    "gptq": "with GPTQ",
    "awq": "with AWQ",
    "fp8": "to FP8",
    "fbgemm_fp8": "to FP8 (FBGEMM)",
    "mxfp4": "to MXFP4",
    "mxfp8": "to MXFP8",
    "nvfp4": "to NVFP4",
    "modelopt": "with NVIDIA ModelOpt",
    "compressed-tensors": "with compressed-tensors (llm-compressor)",
    "bitsandbytes": "with bitsandbytes",
    "quanto": "with quanto",
    "hqq": "with HQQ",
    "torchao": "with torchao",
    "bitnet": "to BitNet's ternary weights",
    "auto-round": "with AutoRound",
    "exl2": "with ExLlamaV2",
    "exl3": "with ExLlamaV3",
    "gguf": "as GGUF",
    "mlx": "with MLX",
}
CONFIG_FILES = {  # beside a config.json that does not say it
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
TENSOR_NAMES = {  # endings of the names of tensors of integers that one method writes
    ".qweight": "gptq",
    ".weight_packed": "compressed-tensors",
    "_blocks": "mxfp4",
    ".weight._data": "quanto",
}
FLOATS = {"F64", "F32", "F16", "BF16"}


def quantisation(directory: Path, config: Mapping[str, object]) -> str | None:
    """How the checkpoint was quantised, to follow "is quantised", as config.json or a file beside it says; None: it was not."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        said = _said(part) if isinstance(part, dict) else None
        if said is not None:
            return said
    for name, method in CONFIG_FILES.items():
        if (directory / name).is_file():
            return _named(method, _read(directory / name))
    return None


def quantisation_of_tensors(dtypes: Mapping[str, str]) -> str | None:
    """As the names and dtypes of the stored tensors show it: safetensors' name of its dtype, by tensor."""
    for name, dtype in dtypes.items():
        if dtype in FLOATS:
            continue
        method = next((method for ending, method in TENSOR_NAMES.items() if name.endswith(ending)), None)
        if method is not None:
            return _named(method, {})
        if name.endswith(".weight"):
            return "to FP8" if dtype.startswith("F8") else f"to {dtype} ({name[:100]})"
    return None


def _said(config: Mapping[str, Any]) -> str | None:
    if isinstance(config.get("quantization"), dict):  # MLX's own, with a copy in `quantization_config` that names no method
        return _named("mlx", config["quantization"])
    for key in ("quantization_config", "compression_config"):
        said = config.get(key)
        if isinstance(said, dict) and said:
            return _named(_method(said), said)
    return None


def _method(said: Mapping[str, object]) -> str:
    method = str(said.get("quant_method") or said.get("method") or "").lower()
    if not method and (said.get("load_in_8bit") or said.get("load_in_4bit")):
        return "bitsandbytes"
    return method or "an unnamed method"


def _named(method: str, said: Mapping[str, object]) -> str:
    named = METHODS.get(method) or METHODS.get(method.partition("_")[0], f"with {method[:60]}")
    bits = said.get("bits") or said.get("w_bit") or said.get("nbits")
    bits = bits or (8 if said.get("load_in_8bit") else 4 if said.get("load_in_4bit") else None)
    if isinstance(bits, int):
        return f"{named} ({bits} bits)"
    return f"{named} ({said['quant_algo']!s:.40})" if said.get("quant_algo") else named


def _read(path: Path) -> Mapping[str, object]:
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
