"""The layers of Llama-shaped models in few torch operations, for decode steps with few rows.

At one row a step, Python and the small operations of a model's own forward take a third of the time (8 of 25 ms for 100
million parameters: casts, decorators, unused masks, a rotary embedding of five operations). Models whose layers all have
one known form are computed here instead: norm, attention, add, norm, gated MLP, add. The self-check of a load compares the
result with the model's own forward, so a model that only seems to have this form is not served by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from node.engine.model.attention import PackedBatch, attend
from node.engine.model.linear import PackedLinear, Sibling

FORMS = ("llama", "mistral", "qwen2", "qwen3")  # `model_type`s whose layers have the form


class RmsNorm:
    """RMSNorm over the last dimension: `x / sqrt(mean(x²) + eps) * weight`.

    Computed as `x * sqrt(size) / hypot(|x|, sqrt(size * eps)) * weight`: five operations where `torch.rms_norm` takes
    eight, each of 5 to 10 microseconds after a matrix product has evicted the caches.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        size = weight.shape[0]
        self._weight = weight.float() * size**0.5
        self._floor = torch.tensor((size * eps) ** 0.5, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(self._floor)
        return x.div(length).mul_(self._weight).to(x.dtype)


@dataclass(frozen=True, slots=True)
class RotaryPositions:
    """The rotary embedding of a step's rows: `cos` and `sin` `[rows, 1, dim]`, the first half of `sin` negated."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates `x` `[rows, heads, dim]` in place."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin, out=x)


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """The parts of one layer."""

    before_attention: RmsNorm
    qkv: PackedLinear
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int
    out: PackedLinear
    before_mlp: RmsNorm
    gate_up: PackedLinear
    activation: nn.Module
    down: PackedLinear

    def run(self, batch: PackedBatch, x: torch.Tensor, rotary: RotaryPositions) -> torch.Tensor:
        """Computes the layer: `[rows, hidden] -> [rows, hidden]`; the rows fill a bucket."""
        rows = x.shape[0]
        qkv = self.qkv.full(self.before_attention(x)).view(rows, -1, self.dim)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = qkv[:, : self.heads], qkv[:, self.heads : self.heads + self.kv_heads]
            queries.copy_(self.query_norm(queries))
            keys.copy_(self.key_norm(keys))
        rotary(qkv[:, : self.heads + self.kv_heads])
        answer = attend(batch, qkv[:, : self.heads], qkv[:, self.heads :], self.scale, self.window)
        x = self.out.plus(answer.view(rows, -1), x)
        gate, up = self.gate_up.full(self.before_mlp(x)).chunk(2, -1)
        return self.down.plus(self.activation(gate).mul_(up), x)


class FusedLlama:
    """A Llama-shaped model's layers `[start, end)` with its embedding, last norm and head."""

    constants_digest = ""  # its bits depend on torch and the CPU too

    def __init__(self, base: Any, head: nn.Module, layers: dict[int, FusedLayer]) -> None:
        self._base = base
        self._head = head
        self._layers = layers
        self._norm = _norm(base.norm)
        self.windows = frozenset(layer.window for layer in layers.values())

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Looks tokens up: `[rows] -> [rows, hidden]`."""
        out: torch.Tensor = self._base.embed_tokens(ids)
        return out

    def run(self, batch: PackedBatch, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Computes the batch's layers over `x` `[rows, hidden]`, which fills a bucket."""
        cos, sin = self._base.rotary_emb(x, positions[None])
        half = sin.shape[-1] // 2
        rotary = RotaryPositions(cos[0, :, None], torch.cat((-sin[..., :half], sin[..., half:]), -1)[0, :, None])
        for number in range(batch.start, batch.end):
            batch.layer = number
            x = self._layers[number].run(batch, x, rotary)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the last norm and the head: `[rows, hidden] -> [rows, vocab]` in float32; the rows fill a bucket."""
        out: torch.Tensor = self._head(self._norm(x))
        return out.float()


def fuse_llama(model: Any, base: object, slots: nn.ModuleList, start: int, end: int) -> FusedLlama | None:
    """Returns the packed `model` in few operations, or None where its layers are not known to have the form."""
    kind = model.config.model_type
    if kind not in FORMS:
        return None
    try:
        layers = {number: _layer(slots[number], kind, model.config) for number in range(start, end)}
        return FusedLlama(base, model.get_output_embeddings(), layers)
    except (AttributeError, TypeError):  # a part is missing, or is something else
        return None


def _norm(module: Any) -> RmsNorm:
    return RmsNorm(module.weight, float(module.variance_epsilon))


def _product(*siblings: nn.Module) -> PackedLinear:
    """Returns the one product that computes all of `siblings`, in this order. Raises TypeError: there is none."""
    shared = [sibling.shared for sibling in siblings if isinstance(sibling, Sibling)]
    if len(shared) < len(siblings) or len(set(map(id, shared))) > 1:
        raise TypeError("not computed as one")
    return shared[0].together


def _packed(module: nn.Module) -> PackedLinear:
    if not isinstance(module, PackedLinear):
        raise TypeError("not a packed product")
    return module


def _layer(layer: Any, kind: str, config: Any) -> FusedLayer:
    """Collects the parts of one layer. Raises AttributeError or TypeError: the layer has another form."""
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    window = getattr(config if kind == "mistral" else attention, "sliding_window", None)
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return FusedLayer(
        before_attention=_norm(layer.input_layernorm),
        qkv=_product(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=None if query_norm is None else _norm(query_norm),
        key_norm=None if key_norm is None else _norm(key_norm),
        heads=attention.q_proj.out_features // dim,
        kv_heads=attention.k_proj.out_features // dim,
        dim=dim,
        scale=float(attention.scaling),
        window=window or 0,
        out=_packed(attention.o_proj),
        before_mlp=_norm(layer.post_attention_layernorm),
        gate_up=_product(mlp.gate_proj, mlp.up_proj),
        activation=mlp.act_fn,
        down=_packed(mlp.down_proj),
    )
