"""Whether a checkpoint's files hold the tensors that its architecture wants, in the shapes it wants: told by their headers.

transformers' own loader does the comparison, for it alone knows which names and shapes it converts; it is given shapes
without storage. A load would find the same, but after the node was announced, and after it had read for minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from node.checkpoints.safetensors_header import StoredTensor, read_header, weight_files
from node.engine.model.attention import NAME
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.structure import META, cannot_serve
from node.weights.store import MARK

MAX_NAMED = 3
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HeaderTensor:
    """A tensor of a file as transformers' loader takes it (`mapped.LateTensor`), without its numbers."""

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored

    def __getitem__(self, whole: object) -> HeaderTensor:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self._stored.shape, dtype=dtype or DTYPES.get(self._stored.dtype, torch.int64), device=META)


def require_tensors(checkpoint: Checkpoint) -> None:
    """Raises BadRequest: the files lack tensors, or hold some of another shape. Of a model from peers only a part is here."""
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
        raise cannot_serve(checkpoint, reason) from error
    if found["missing_keys"]:
        raise cannot_serve(checkpoint, f"the checkpoint lacks {_some(sorted(found['missing_keys']))}")
    if found["mismatched_keys"]:
        shapes = [f"{name} is {list(stored)}, expected {list(wanted)}" for name, stored, wanted in found["mismatched_keys"]]
        raise cannot_serve(checkpoint, f"tensors have other shapes than its config says: {_some(sorted(shapes))}")


def _some(things: Sequence[str]) -> str:
    more = f" and {len(things) - MAX_NAMED} more" if len(things) > MAX_NAMED else ""
    return ", ".join(things[:MAX_NAMED]) + more
