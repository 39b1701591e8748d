"""How a model is split over ranks in equal parts: which matrices by their outputs, which by their inputs. No I/O.

The first matrices of attention and MLP are split by outputs (whole heads, a part of the intermediate size), so a rank
continues with its own part alone; the last matrix is split by inputs, and each rank's product is one summand of the output:
two all-reduces a layer (Megatron-LM, arXiv 1909.08053). transformers names the style of each matrix (`base_model_tp_plan`);
other styles than those two (queries, keys and values in one matrix, norms over all heads at once) are refused by name.

There may be fewer key and value heads than ranks; each is then held by several ranks, if the numbers divide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from mesh.errors import BadRequest

MAX_RANKS = 64
SERVED = "llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gpt_neox, granite, cohere or smollm3"
WHOLE = "replicated_with_grad_allreduce"  # transformers' style of modules that every rank holds in full


class TensorSplit(Enum):
    OUTPUTS = auto()
    KV_HEADS = auto()  # by outputs too; several ranks may hold the same part
    INPUTS = auto()


@dataclass(frozen=True, slots=True)
class ShardedModelShape:
    """The facts about a model that decide how it is split."""

    name: str
    kind: str  # the architecture, `model_type`
    plan: Mapping[str, str]  # module below the base model -> style, in transformers' terms
    heads: int
    kv_heads: int
    mixture: bool


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """How the matrices of one model are split over `ranks`."""

    ranks: int
    kv_heads: int
    splits: tuple[tuple[re.Pattern[str], TensorSplit], ...]

    @property
    def kv_copies(self) -> int:
        """How many ranks hold the same keys and values."""
        return max(1, self.ranks // self.kv_heads)

    def split_of(self, module: str) -> TensorSplit | None:
        """Returns how the matrix of the named module is split; None: every rank holds all of it."""
        return next((split for pattern, split in self.splits if pattern.search(module)), None)

    def part(self, split: TensorSplit, size: int, rank: int) -> range:
        """Returns the rank's outputs, or inputs, of `size` in all.

        Raises:
            ValueError: they cannot be split into equal parts.
        """
        assert 0 <= rank < self.ranks
        parts, number = self.ranks, rank
        if split is TensorSplit.KV_HEADS and self.kv_copies > 1:
            parts, number = self.kv_heads, rank // self.kv_copies
        if size % parts:
            raise ValueError(f"{size} {split.name.lower()} cannot be cut into {parts} equal parts")
        width = size // parts
        return range(number * width, (number + 1) * width)

    def vocabulary(self, size: int, rank: int) -> range:
        """Returns the rank's tokens, for the embedding and the head; sizes of parts may differ by one."""
        return range(size * rank // self.ranks, size * (rank + 1) // self.ranks)


def plan_shards(shape: ShardedModelShape, ranks: int) -> ShardPlan:
    """Plans how to split such a model into `ranks` parts.

    Raises:
        BadRequest: it cannot be split so; with the reason, and what would work.
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise BadRequest(f"--tensor-parallel: expected 1 to {MAX_RANKS} workers, got {ranks}", "tensor_parallel")
    if shape.mixture:
        raise _refusal(shape, ranks, "its experts are not cut")
    splits = {module: style for module, style in shape.plan.items() if module.startswith("layers.") and style != WHOLE}
    if not splits:
        raise _refusal(shape, ranks, "transformers knows no plan for it")
    for module, style in splits.items():
        if style not in ("colwise", "rowwise"):
            raise _refusal(shape, ranks, f"{module.removeprefix('layers.*.')} does not fall into parts of one rank each")
    if shape.heads % ranks:
        raise _refusal(shape, ranks, f"its {shape.heads} attention heads do not divide by {ranks}")
    if shape.kv_heads % ranks and ranks % shape.kv_heads:
        raise _refusal(
            shape, ranks, f"neither do its {shape.kv_heads} key and value heads divide by {ranks}, nor {ranks} by them"
        )
    return ShardPlan(
        ranks, shape.kv_heads, tuple((_pattern(module), _split_for(module, style)) for module, style in splits.items())
    )


def _pattern(module: str) -> re.Pattern[str]:
    return re.compile(r"(?:^|\.)" + re.escape(module).replace(r"\*", r"\d+") + "$")


def _split_for(module: str, style: str) -> TensorSplit:
    if style == "rowwise":
        return TensorSplit.INPUTS
    return TensorSplit.KV_HEADS if module.endswith((".k_proj", ".v_proj")) else TensorSplit.OUTPUTS


def _refusal(shape: ShardedModelShape, ranks: int, reason: str) -> BadRequest:
    return BadRequest(
        f"{shape.name} ({shape.kind}) cannot be computed by {ranks} workers: {reason}; leave --tensor-parallel out, take another "
        f"number, or a {SERVED} model",
        param="tensor_parallel",
        code="model_not_servable",
    )
