"""How a model is cut into equal parts, one a rank: which matrices by their outputs, which by their inputs. No I/O.

A layer's first matrices are cut by outputs (whole heads, a part of the MLP's middle), so a rank goes on with its own part
alone; the last matrix of each half is cut by inputs, and what it gives is one summand of the layer's answer: two sums a
layer. Which is which, transformers says for each architecture (`base_model_tp_plan`); other styles than those two
(queries, keys and values in one matrix, norms over all heads at once) are refused by name.

Keys and values have few heads. Where these do not divide by the ranks, but the ranks by them, each is held by several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from mesh.errors import BadRequest

MAX_RANKS = 64
SERVED = "llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gpt_neox, granite, cohere or smollm3"
WHOLE = "replicated_with_grad_allreduce"  # transformers' word for what every rank holds


class TensorSplit(Enum):
    OUTPUTS = auto()
    KV_HEADS = auto()  # by outputs too, some of which several ranks may hold
    INPUTS = auto()


@dataclass(frozen=True, slots=True)
class ShardedModelShape:
    """What must be known of a model to cut it."""

    name: str
    kind: str  # the architecture, `model_type`
    plan: Mapping[str, str]  # module below the base model -> style, as transformers says it
    heads: int
    kv_heads: int
    mixture: bool


@dataclass(frozen=True, slots=True)
class ShardPlan:
    ranks: int
    kv_heads: int
    cuts: tuple[tuple[re.Pattern[str], TensorSplit], ...]

    @property
    def kv_copies(self) -> int:
        """Ranks that hold the same keys and values."""
        return max(1, self.ranks // self.kv_heads)

    def cut(self, module: str) -> TensorSplit | None:
        """How the matrix of the named module is cut; None: every rank holds all of it."""
        return next((cut for pattern, cut in self.cuts if pattern.search(module)), None)

    def part(self, cut: TensorSplit, size: int, rank: int) -> range:
        """The rank's outputs, or inputs, of `size` in all.

        Raises:
            ValueError: they cannot be cut into equal parts.
        """
        parts, number = self.ranks, rank
        if cut is TensorSplit.KV_HEADS and self.kv_copies > 1:
            parts, number = self.kv_heads, rank // self.kv_copies
        if size % parts:
            raise ValueError(f"{size} {cut.name.lower()} cannot be cut into {parts} equal parts")
        width = size // parts
        return range(number * width, (number + 1) * width)

    def vocabulary(self, size: int, rank: int) -> range:
        """The rank's tokens, for the embedding and the head; parts may differ by one."""
        return range(size * rank // self.ranks, size * (rank + 1) // self.ranks)


def cutting_for(shape: ShardedModelShape, ranks: int) -> ShardPlan:
    """How to cut such a model into `ranks` parts.

    Raises:
        BadRequest: it cannot be cut so; with the reason, and what would work.
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise BadRequest(f"--tensor-parallel: expected 1 to {MAX_RANKS} workers, got {ranks}", "tensor_parallel")
    if shape.mixture:
        raise _refusal(shape, ranks, "its experts are not cut")
    cuts = {module: style for module, style in shape.plan.items() if module.startswith("layers.") and style != WHOLE}
    if not cuts:
        raise _refusal(shape, ranks, "transformers knows no plan for it")
    for module, style in cuts.items():
        if style not in ("colwise", "rowwise"):
            raise _refusal(shape, ranks, f"{module.removeprefix('layers.*.')} does not fall into parts of one rank each")
    if shape.heads % ranks:
        raise _refusal(shape, ranks, f"its {shape.heads} attention heads do not divide by {ranks}")
    if shape.kv_heads % ranks and ranks % shape.kv_heads:
        raise _refusal(
            shape, ranks, f"neither do its {shape.kv_heads} key and value heads divide by {ranks}, nor {ranks} by them"
        )
    return ShardPlan(ranks, shape.kv_heads, tuple((_pattern(module), _batch(module, style)) for module, style in cuts.items()))


def _pattern(module: str) -> re.Pattern[str]:
    return re.compile(r"(?:^|\.)" + re.escape(module).replace(r"\*", r"\d+") + "$")


def _batch(module: str, style: str) -> TensorSplit:
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
