"""Checks by the files' headers that a checkpoint holds the tensors of its architecture, in the right shapes.

transformers' own loader compares them, for its code alone defines which names and shapes it converts; it gets shapes
without storage. A load would find the same faults, but after the node was announced and had read for minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from node.checkpoints.safetensors_header import StoredTensor, read_header, weight_files
from node.engine.model.attention import NAME
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.structure import META, not_servable
from node.weights.store import MARK

MAX_NAMED = 3
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HeaderTensor:
    """A tensor of a file for transformers' loader, like `mapped.LazyTensor`, with its shape and no data."""

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored

    def __getitem__(self, whole: object) -> HeaderTensor:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self._stored.shape, dtype=dtype or DTYPES.get(self._stored.dtype, torch.int64), device=META)


def require_tensors(checkpoint: Checkpoint) -> None:
    """Checks the tensors of a checkpoint; of a model fetched from peers, only some files are here, and nothing is checked.

    Raises:
        BadRequest: the files lack tensors, or hold some of another shape.
    """
    if (checkpoint.directory / MARK).is_file():
        return
    cls: Any = checkpoint.model_class
    body = {"__module__": cls.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]}
    named = {name: HeaderTensor(each) for path in weight_files(checkpoint.directory) for name, each in read_header(path).items()}
    try:
        _, found = type(cls.__name__, (cls,), body).from_pretrained(  # type: ignore[attr-defined]
            None,
            state_dict=named,
            config=copy.deepcopy(checkpoint.config),
            dtype=torch.float32,
            attn_implementation=NAME,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # whatever the loader of some architecture raises
        reason = f"its tensors are not those of its config ({' '.join(str(error).split())[:200]})"
        raise not_servable(checkpoint, reason) from error
    if found["missing_keys"]:
        raise not_servable(checkpoint, f"the checkpoint lacks {_some(sorted(found['missing_keys']))}")
    if found["mismatched_keys"]:
        shapes = [f"{name} is {list(stored)}, expected {list(wanted)}" for name, stored, wanted in found["mismatched_keys"]]
        raise not_servable(checkpoint, f"tensors have other shapes than its config says: {_some(sorted(shapes))}")


def _some(things: Sequence[str]) -> str:
    more = f" and {len(things) - MAX_NAMED} more" if len(things) > MAX_NAMED else ""
    return ", ".join(things[:MAX_NAMED]) + more
