"""The model as it is trained: few, large products, nothing computed for tokens that nobody is asked about.

The same function as transformers' Llama (a test compares the logits), with the projections of queries, keys and
values done in one, likewise gate and up. Weights are kept in float32 and cast to the compute type where they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.default_model.shape import Shape


class Layer(nn.Module):
    """One decoder layer. `compute` is the type of products and activations; the sums of the residual are in it too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.mixer_norm = nn.Parameter(torch.ones(shape.width))
        self.query, self.key, self.value, self.out = (nn.Parameter(torch.empty(shape.width, shape.width)) for _ in range(4))
        self.gate, self.up = (nn.Parameter(torch.empty(shape.inner, shape.width)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(shape.width, shape.inner))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """`x` [rows, tokens, width] -> the same; `mask` [rows, 1, tokens, tokens], added to scores; None: causal."""
        rows, tokens, width = x.shape
        heads, dim = self.shape.heads, self.shape.head_dim
        normed = functional.rms_norm(x, (width,), self.attention_norm.to(x.dtype), self.shape.norm_eps)
        qkv = functional.linear(normed, _fused(x.dtype, self.query, self.key, self.value)).view(rows, tokens, 3, heads, dim)
        turned = _rotated(qkv[:, :, :2], cos, sin)  # [rows, tokens, 2, heads, dim]
        q, k, v = turned[:, :, 0].transpose(1, 2), turned[:, :, 1].transpose(1, 2), qkv[:, :, 2].transpose(1, 2)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + functional.linear(seen.transpose(1, 2).reshape(rows, tokens, width), self.out.to(x.dtype))
        normed = functional.rms_norm(x, (width,), self.mixer_norm.to(x.dtype), self.shape.norm_eps)
        gate, up = functional.linear(normed, _fused(x.dtype, self.gate, self.up)).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, self.down.to(x.dtype))


class Model(nn.Module):
    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocabulary, shape.width))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, chance: torch.Generator) -> None:
        """Normal, 0.02; what writes into the residual smaller by the square root of the number of writers."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith((".out", ".down"))
                std = 0.02 / (2 * self.shape.layers) ** 0.5 if writes else 0.02
                nn.init.normal_(parameter, std=std, generator=chance)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, compute: torch.dtype = torch.float32) -> Tensor:
        """`ids`, `positions` [rows, tokens] int -> hidden states after the last norm [rows, tokens, width]."""
        x = functional.embedding(ids, self.embedding).to(compute)
        cos, sin = rotary_tables(self.shape, positions, compute)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return functional.rms_norm(x, (self.shape.width,), self.norm.to(x.dtype), self.shape.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [n, width] -> [n, vocabulary] in its type."""
        return functional.linear(hidden, self.embedding.to(hidden.dtype))


def rotary_tables(shape: Shape, positions: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [rows, tokens, 1, 1, head_dim]."""
    exponents = torch.arange(0, shape.head_dim, 2, device=positions.device).float() / shape.head_dim
    angles = positions.float()[:, :, None] * shape.rope_theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)[:, :, None, None, :]
    return angles.cos().to(compute), angles.sin().to(compute)


def block_mask(segments: Tensor, compute: torch.dtype) -> Tensor:
    """For rows of packed examples: each token sees its own example up to itself.

    `segments` [rows, tokens] int, one number an example -> [rows, 1, tokens, tokens], 0 where seen, else minus infinity.
    """
    tokens = segments.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=segments.device).tril()
    seen = (segments[:, :, None] == segments[:, None, :]) & causal
    return torch.zeros(seen.shape, dtype=compute, device=segments.device).masked_fill_(~seen, float("-inf"))[:, None]


def _fused(compute: torch.dtype, *weights: Tensor) -> Tensor:
    return torch.cat([weight.to(compute) for weight in weights])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
