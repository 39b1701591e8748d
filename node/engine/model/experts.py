"""Mixture-of-experts layers that give a row the same bits in every batch.

The number of rows of an expert depends on the batch, and with it the kernel that multiplies them: with transformers' own
loops a row's bits depend on the other rows. Here each expert's weights are packed like any linear layer and its rows padded
to the same buckets; a row's experts are summed in the order of their numbers, in float32. The router, a product with a
weight of its own, is run on row counts for which trials found all of its outputs, weights and choices, to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from node.engine.model.attention import running_sequence_rows
from node.engine.model.linear import BUCKETS, VECTOR_ELEMENTS, Kernel, PackedLinear, agreeing_buckets, bucket_for, linear_modules

Routed = tuple[torch.Tensor, ...]
"""The outputs of a router, each `[rows, …]`."""


class PackedExperts(nn.Module):
    """Stands for a layer's experts in transformers' common form: weights `[experts, outputs, inputs]`, or transposed."""

    def __init__(self, experts: Any, kernel: Kernel) -> None:
        """Packs the experts' weights.

        Raises:
            ValueError: the kernel cannot hold these weights.
        """
        super().__init__()
        self._gated = experts.has_gate
        self._combine: Callable[[torch.Tensor], torch.Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn
        self._up = _packed(experts, "gate_up_proj" if experts.has_gate else "up_proj", kernel)
        self._down = _packed(experts, "down_proj", kernel)

    @property
    def products(self) -> list[PackedLinear]:
        """The packed products of all experts."""
        return [*self._up, *self._down]

    def forward(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns the weighted sums `[rows, hidden]` of the experts `chosen` `[rows, k]` with `weights` `[rows, k]`.

        Rows that pad the batch to a bucket are skipped: they would only make more experts read their weights.
        """
        assert chosen.shape == weights.shape, "one weight for each chosen expert"
        sequence_rows = min(running_sequence_rows(), len(rows))
        per_row = chosen.shape[1]
        flat = chosen[:sequence_rows].flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=len(self._up))[: len(self._up)].tolist()  # numbers beyond are padding
        shares = weights[:sequence_rows].flatten()
        out = torch.zeros(rows.shape, dtype=torch.float32)
        at = 0
        for expert, count in enumerate(counts):
            if count:
                picked = order[at : at + count]
                at += count
                tokens = picked // per_row
                answer = self._expert(expert, rows[tokens]).float() * shares[picked, None].float()
                out.index_add_(0, tokens, answer)
        return out.to(rows.dtype)

    def _expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """Computes one expert: `[count, hidden] -> [count, hidden]`, padded once for both products and the activation."""
        up, down = self._up[number], self._down[number]
        largest, parts = up.buckets[-1], []
        for piece in rows.split(largest):
            short = bucket_for(len(piece), up.buckets) - len(piece)
            filled = F.pad(piece, (0, 0, 0, short)) if short else piece
            parts.append(down(self._combine(up(filled)))[: len(piece)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _packed(experts: Any, name: str, kernel: Kernel) -> list[PackedLinear]:
    """Packs the named product of every expert and removes the parameter."""
    weights, biases = getattr(experts, name).data, getattr(experts, f"{name}_bias", None)
    packed = []
    for number, held in enumerate(weights):
        weight = held.t() if experts.is_transposed else held
        bias = None if biases is None else biases.data[number]
        packed.append(PackedLinear(kernel.pack(weight.contiguous(), bias), weight.shape[1], weight.shape[0], BUCKETS))
    delattr(experts, name)
    return packed


def experts_modules(root: nn.Module) -> Iterable[tuple[nn.Module, str, object]]:
    """Yields every set of experts below `root` that can be packed, as (parent, name, experts)."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if (
                hasattr(child, "_apply_gate")
                and hasattr(child, "is_transposed")
                and not getattr(child, "has_post_expert_norm", 0)
            ):
                yield parent, name, child


def expert_widths(root: nn.Module) -> set[int]:
    """Returns the widths of all rows that `PackedExperts` of the sets below `root` will compute."""
    found: set[int] = set()
    for _, _, experts in experts_modules(root):
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            found |= set(getattr(experts, name).shape[1:]) if isinstance(getattr(experts, name, None), nn.Parameter) else set()
    return found


def pack_experts(root: nn.Module, kernel: Kernel) -> list[PackedLinear]:
    """Packs every set of experts below `root`; returns all their products, whose buckets are not yet found.

    Raises:
        ValueError: the kernel cannot hold these weights.
    """
    products = []
    for parent, name, experts in experts_modules(root):
        packed = PackedExperts(experts, kernel)
        setattr(parent, name, packed)
        products += packed.products
    return products


class Router:
    """Runs a router's own forward on row counts that give every row the same bits."""

    def __init__(self, route: Callable[..., Any], choices: int, threads: int) -> None:
        chunk = VECTOR_ELEMENTS * threads
        self._route = route
        self._candidates = tuple(count for count in BUCKETS if count * choices % chunk == 0) or BUCKETS
        self._buckets: tuple[int, ...] = ()

    def __call__(self, x: torch.Tensor, *further: torch.Tensor) -> object:
        """Returns the router's outputs for `x` `[…, hidden]`. `further`: vectors that some routers add to every row's scores.

        A router of another form is called as it is; the self-check of a load finds out whether it is exact.
        """
        rows = x.reshape(-1, x.shape[-1])
        if not self._buckets and not self._settle(rows, further):
            return self._route(x, *further)
        pieces = [self._padded(piece, further) for piece in rows.split(self._buckets[-1])]
        return tuple(torch.cat(parts) for parts in zip(*pieces))

    def _settle(self, rows: torch.Tensor, further: tuple[torch.Tensor, ...]) -> bool:
        """Finds the row counts, at the first call, when the router's other arguments are known; False: another form."""
        probe = self._route(F.pad(rows[:1], (0, 0, 0, 1)), *further) if all(part.dim() == 1 for part in further) else None
        if not isinstance(probe, tuple) or not all(isinstance(part, torch.Tensor) and len(part) == 2 for part in probe):
            return False
        agreed = agreeing_buckets(lambda tried: _flat(self._route(tried, *further)), rows.shape[1], rows.dtype, self._candidates)
        self._buckets = agreed or self._candidates
        return True

    def _padded(self, rows: torch.Tensor, further: tuple[torch.Tensor, ...]) -> Routed:
        count = len(rows)
        short = bucket_for(count, self._buckets) - count
        answer: Routed = self._route(F.pad(rows, (0, 0, 0, short)) if short else rows, *further)
        return tuple(part[:count] for part in answer)


def place_routers(root: nn.Module, threads: int) -> None:
    """Wraps every router below `root` in a `Router`: every module with a matrix that is no linear layer or embedding."""
    linear = {id(layer) for _, _, layer in linear_modules(root)}
    for module in list(root.modules()):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and id(module) not in linear and not isinstance(module, nn.Embedding):
            module.forward = Router(module.forward, len(weight), threads)


def _flat(answer: Routed) -> torch.Tensor:
    """Joins a router's outputs to one row each, as float64, which holds all narrower types exactly."""
    return torch.cat([part.reshape(len(part), -1).double() for part in answer], -1)
