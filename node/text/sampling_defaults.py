"""Reads a model's own `generation_config.json`: how it samples where a request leaves a field unset, and its end tokens.

The names are transformers' (`GenerationConfig`), the way they are taken is vLLM's: only what the file names counts, and
what the client names goes before it. `do_sample: false` means greedy decoding, so temperature 0; a file without a value
of `do_sample` leaves the temperature to the file, else to the API's default.

The file may come from peers: a value counts within the range that a request's has, else it is passed over and logged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import structlog

from mesh.json_object import JsonObject
from node.requests import SamplingParams

FILE = "generation_config.json"
FILE_MAX_BYTES = 1 << 20
RANGES = {  # lowest and highest, as for a request; without the lowest where 0 is no number of the kind
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 10.0),
}
ABOVE_LOWEST = {"top_p", "repetition_penalty"}
NOT_FOLLOWED: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": ([],),
    "watermarking_config": (),
}
"""Fields of the file that would change answers and are not implemented, with the values that ask for nothing beside null."""

log = structlog.get_logger()


def generation_config(directory: Path) -> dict[str, object]:
    """The fields of the model's file (*blocking*); empty where it has none, or one that cannot be read."""
    path = directory / FILE
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise ValueError("too large")
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("generation_config.ignored", model=directory.name, why=type(error).__name__)
        return {}
    if not isinstance(config, dict):
        log.warning("generation_config.ignored", model=directory.name, why="no object")
        return {}
    return config


def end_tokens(config: JsonObject) -> tuple[int, ...]:
    """The end-of-sequence ids that the file names: one, or a list of them."""
    named = config.get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    return tuple(token for token in listed if isinstance(token, int) and not isinstance(token, bool) and token >= 0)


def sampling_defaults(config: JsonObject, model: str) -> dict[str, float | int]:
    """The fields of `SamplingParams` that the file sets. What it asks for in vain is logged under the model's name."""
    found: dict[str, float | int] = {}
    for name in RANGES:
        value = config.get(name)
        if value is None:
            continue
        if not _fits(name, value):
            log.warning("generation_config.ignored", model=model, field=name)
            continue
        found[name] = max(value, 0) if name == "top_k" else float(value)  # -1 means all, as 0 does
    samples = config.get("do_sample")
    if samples is False:
        found["temperature"] = 0.0
    elif samples is not None and samples is not True:
        log.warning("generation_config.ignored", model=model, field="do_sample")
    if asked := [name for name, neutral in NOT_FOLLOWED.items() if config.get(name) is not None and config[name] not in neutral]:
        log.warning("generation_config.not_followed", model=model, fields=asked)
    return found


def _fits(name: str, value: object) -> bool:
    kinds = (int,) if name == "top_k" else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    low, high = RANGES[name]
    return low <= value <= high and not (value == low and name in ABOVE_LOWEST)


def settled(sampling: SamplingParams, unset: Iterable[str], defaults: Mapping[str, float | int]) -> SamplingParams:
    """`sampling` with the model's own values in the fields that the client left `unset`."""
    return msgspec.structs.replace(sampling, **{name: defaults[name] for name in unset if name in defaults})
