"""One rank's shard of a model: the model's own modules with smaller matrices, for which only this rank's parts are read.

The model's class is pruned to the span (`node.engine.model.local_stage`); then each module that is split gets its smaller
shape. Weights come through the ordinary loader, which indexes each tensor of a file; here the index returns the rank's part.
Biases of matrices that are split by inputs belong to the sum once, so only the first rank has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from mesh.errors import BadRequest
from node.checkpoints.safetensors_header import weight_files
from node.engine.model.all_reduce import AllReduce, SharedEmbedding, SummedProduct
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.linear import PackedLinear
from node.engine.model.shard_plan import ShardedModelShape, ShardPlan, TensorSplit, plan_shards


@dataclass(frozen=True, slots=True)
class ShardPart:
    """The part of a tensor that a rank holds: `range` of dimension `dim`; `absent`: zeros of that shape."""

    dim: int
    range: range
    absent: bool = False

    def of(self, stored: Any) -> torch.Tensor:
        """Reads the part from a slice of a safetensors file."""
        here = slice(self.range.start, self.range.stop)
        taken: torch.Tensor = stored[here] if self.dim == 0 else stored[:, here]
        return torch.zeros_like(taken) if self.absent else taken


class StoredPart:
    """A tensor of a file for transformers' loader, which reads it by indexing and gets the rank's part."""

    def __init__(self, stored: Any, part: Callable[[], ShardPart | None]) -> None:
        self._stored = stored
        self._part = part

    def get_shape(self) -> list[int]:
        shape: list[int] = self._stored.get_shape()
        return shape

    def get_dtype(self) -> str:
        dtype: str = self._stored.get_dtype()
        return dtype

    def __getitem__(self, everything: object) -> torch.Tensor:
        part = self._part()
        whole: torch.Tensor = self._stored[everything] if part is None else part.of(self._stored)
        return whole


def shard_plan_of(checkpoint: Checkpoint, ranks: int) -> ShardPlan:
    """Plans how the checkpoint's model is split. Raises BadRequest, as `plan_shards`."""
    config: Any = checkpoint.config
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    return plan_shards(
        ShardedModelShape(
            name=checkpoint.directory.name,
            kind=config.model_type,
            plan=getattr(config, "base_model_tp_plan", None) or {},
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            mixture=checkpoint.mixture,
        ),
        ranks,
    )


class Shard:
    """The shard of rank `rank`; its methods are called in the order in which they stand."""

    def __init__(self, shard_plan: ShardPlan, rank: int) -> None:
        self.shard_plan = shard_plan
        self.rank = rank
        self._parts: dict[str, ShardPart] = {}
        self._prefix = ""
        self._renamings: list[Any] = []
        self._names: dict[str, object] = {}
        self._first_token = 0

    # ---- before the weights are read

    def split_modules(self, model: Any) -> None:
        """Gives the modules of a model on the meta device their shapes on this rank.

        Raises:
            BadRequest: a module cannot be split.
        """
        assert 0 <= self.rank < self.shard_plan.ranks
        self._prefix = model.base_model_prefix
        self._renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        self._names = model.state_dict()
        edges = model.get_input_embeddings(), model.get_output_embeddings()
        for name, module in model.named_modules():
            if any(module is edge for edge in edges):
                self._split_vocabulary(name, module)
            elif isinstance(module, nn.Linear) and (split := self.shard_plan.split_of(name)) is not None:
                self._split_linear(name, module, split)
            elif ".layers." in f".{name}" and any(tensor.dim() > 1 for tensor in module.parameters(recurse=False)):
                raise self._cannot_split(name, f"it is a {type(module).__name__} that no plan names")

    def _split_linear(self, name: str, layer: nn.Linear, split: TensorSplit) -> None:
        try:
            if split is TensorSplit.INPUTS:
                part = self.shard_plan.part(split, layer.in_features, self.rank)
                layer.in_features = len(part)
                self._resize(name, layer, "weight", ShardPart(1, part))
                if layer.bias is not None:
                    self._parts[f"{name}.bias"] = ShardPart(0, range(layer.out_features), absent=self.rank > 0)
            else:
                part = self.shard_plan.part(split, layer.out_features, self.rank)
                layer.out_features = len(part)
                for tensor in ("weight", "bias"):
                    self._resize(name, layer, tensor, ShardPart(0, part))
        except ValueError as error:
            raise self._cannot_split(name, str(error)) from None

    def _split_vocabulary(self, name: str, module: object) -> None:
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            return  # absent: another stage has the embedding or the head
        part = self.shard_plan.vocabulary(module.weight.shape[0], self.rank)
        for tensor in ("weight", "bias"):
            self._resize(name, module, tensor, ShardPart(0, part))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(part)
            module.padding_idx = None  # used in training only, and it may lie in another rank's part
            self._first_token = part.start
        else:
            module.out_features = len(part)

    def _resize(self, name: str, module: nn.Module, tensor: str, part: ShardPart) -> None:
        before = getattr(module, tensor, None)
        if before is None:
            return
        shape = [len(part.range) if dim == part.dim else size for dim, size in enumerate(before.shape)]
        setattr(module, tensor, nn.Parameter(before.new_empty(shape), requires_grad=False))
        self._parts[f"{name}.{tensor}"] = part

    def _cannot_split(self, module: str, reason: str) -> BadRequest:
        return BadRequest(
            f"{module} cannot be computed by {self.shard_plan.ranks} workers ({reason}); take another number, or leave "
            "--tensor-parallel out",
            param="tensor_parallel",
            code="model_not_servable",
        )

    # ---- as they are read

    def tensors(self, directory: Path) -> dict[str, StoredPart]:
        """Returns every tensor of the checkpoint by its name; nothing is read yet."""
        found: dict[str, StoredPart] = {}
        for file in weight_files(directory):
            opened: Any = safe_open(file, "pt")
            for name in opened.keys():  # noqa: SIM118 - no mapping
                found[name] = StoredPart(opened.get_slice(name), lambda name=name: self._part_of(name))  # type: ignore[misc]
        return found

    def _part_of(self, name: str) -> ShardPart | None:
        """Returns this rank's part of a tensor; checkpoints may use older names, or omit the base model's prefix."""
        renamed, _ = rename_source_key(name, self._renamings, [], self._prefix, self._names)
        return self._parts.get(renamed)

    # ---- once they are packed

    def join(self, model: Any, all_reduce: AllReduce) -> None:
        """Adds an all-reduce after every matrix that is split by inputs, and after the embedding."""
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear) and self.shard_plan.split_of(name) is TensorSplit.INPUTS:
                module.product = SummedProduct(module.product, all_reduce)
        embedding = model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            model.set_input_embeddings(SharedEmbedding(embedding, self._first_token, all_reduce))
