"""What a model's own `generation_config.json` says of sampling: it holds where a request leaves a field unset, as in vLLM.

The file may come from peers: a value counts within the range that a request's has, else it is passed over and logged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import structlog

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

log = structlog.get_logger()


def sampling_defaults(directory: Path) -> dict[str, float | int]:
    """The fields of `SamplingParams` that the model's file sets; empty where it has none."""
    path = directory / FILE
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise ValueError("too large")
        said = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("generation_config.ignored", model=directory.name, why=type(error).__name__)
        return {}
    if not isinstance(said, dict):
        log.warning("generation_config.ignored", model=directory.name, why="no object")
        return {}
    found: dict[str, float | int] = {}
    for name in RANGES:
        value = said.get(name)
        if value is None:
            continue
        if not _fits(name, value):
            log.warning("generation_config.ignored", model=directory.name, field=name)
            continue
        found[name] = max(value, 0) if name == "top_k" else float(value)  # -1 means all, as 0 does
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
