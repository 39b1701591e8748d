"""How a loaded span becomes a packed one: layer by layer, so that no more than one layer is held in both forms.

A layer may be packed as soon as nothing asks for its own weights any more; the oracle of the self-check runs the plain
layers in order, and each is packed right behind it. What the layers share, the row counts they all agree on, is settled
when the last one is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from node.engine.model.checkpoint import Checkpoint
from node.engine.model.compiled_layers import NativeLayer, NativeLayers, fits, native_layer, native_layers
from node.engine.model.experts import expert_widths, pack_experts, place_routers
from node.engine.model.fused_llama import FORMS, FusedLlama, fused_form
from node.engine.model.linear import (
    BUCKETS,
    NARROW,
    VECTOR_ELEMENTS,
    Kernel,
    PackedLinear,
    agreeing_buckets,
    linear_modules,
    pack,
    pack_siblings,
    siblings,
)
from node.engine.model.mapped import LetGo, give_back_freed

OUTER_ROWS = 64  # the head is given one row a sequence, so larger buckets need no trial on its many columns


@dataclass(frozen=True, slots=True)
class PrunedSpan:
    """A pruned model's layers `[start, end)` among its `slots`; `base`: the model without its head."""

    model: Any
    base: Any
    slots: nn.ModuleList
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PackedSpan:
    """What a packed span is run by."""

    buckets: tuple[int, ...]
    fused: FusedLlama | NativeLayers | None
    inner: list[PackedLinear]  # the layers' products, where they are not compiled as a whole
    loose: bool  # there are weights that are not packed, whose products promise nothing


class SpanPacker:
    """One span on its way into packed form."""

    def __init__(
        self,
        span: PrunedSpan,
        checkpoint: Checkpoint,
        kernel: Kernel,
        threads: int,
        let_go: LetGo,
        packed: Callable[[], None],
        whole: bool = True,
    ) -> None:
        """`let_go`: of memory that is not needed any more; `packed`: told of each layer; `whole`: no shard of the span."""
        self._span = span
        self._checkpoint = checkpoint
        self._kernel = kernel
        self._threads = threads
        self._device = next(span.model.parameters()).device
        self._let_go = let_go
        self._told = packed
        form = whole and kernel.compiled and checkpoint.config.model_type in FORMS
        self._compiled = form and fits(span.model, span.base, span.slots, span.start, span.end)
        self._even = () if self._compiled else self._even_buckets()
        self._native: dict[int, NativeLayer] = {}
        self._inner: list[PackedLinear] = []

    def layer(self, number: int) -> None:
        """Packs one layer.

        Raises:
            ValueError: this kernel cannot hold the weights.
        """
        slot = self._span.slots[number]
        own = [parameter.data for parameter in slot.parameters()]
        self._let_go(own)  # the plain model has touched all of them
        if self._compiled:
            self._native[number] = native_layer(slot, self._span.model.config, self._kernel.quantize, self._let_go)
        else:
            self._inner += pack_experts(slot, self._kernel)
            self._inner += [pack_siblings(parent, names, self._kernel) for parent, names in siblings(slot)]
            for parent, name, layer in linear_modules(slot):
                self._inner.append(pack(layer, self._kernel))
                setattr(parent, name, self._inner[-1])
            self._let_go(own)
        del own
        give_back_freed()
        self._told()

    def finish(self) -> PackedSpan:
        """Packs what stands around the layers, once they are all packed.

        Raises:
            ValueError: this kernel cannot hold the weights, or no two row counts agree.
        """
        model, slots = self._span.model, self._span.slots
        outer = [parameter.data for parameter in model.parameters()]
        try:
            if self._compiled:
                return PackedSpan((1,), native_layers(model, self._span.base, self._native, self._kernel), [], loose=False)
            place_routers(slots, self._threads)
            buckets = self._settle()
            fused = fused_form(model, self._span.base, slots, self._span.start, self._span.end)
            return PackedSpan(buckets, fused, self._inner, loose=any(tensor.dim() > 2 for tensor in slots.parameters()))
        finally:
            self._let_go(outer)

    def _settle(self) -> tuple[int, ...]:
        """Packs the head, and what some models put around the layers; tells every product its row counts."""
        buckets = self._agreed(self._inner, self._even)
        outer = []
        for parent, name, layer in linear_modules(self._span.model):
            outer.append(pack(layer, self._kernel))
            setattr(parent, name, outer[-1])
        small = tuple(count for count in buckets if count <= OUTER_ROWS) or buckets
        agreed = self._agreed(outer, small)
        settled = tuple(count for count in buckets if count in agreed or count not in small)
        for packed in self._inner:
            packed.buckets = settled
        for packed in outer:
            packed.buckets = agreed
        return settled

    def _agreed(self, layers: list[PackedLinear], buckets: tuple[int, ...]) -> tuple[int, ...]:
        """The buckets on which one layer of each shape agrees."""
        tried = set()
        for packed in layers:
            if (packed.in_features, packed.out_features) not in tried:
                tried.add((packed.in_features, packed.out_features))
                for product in (packed.product, packed.twice):
                    buckets = agreeing_buckets(product, packed.in_features, self._kernel.dtype, buckets, self._device)
        if not buckets:
            raise ValueError(f"{self._kernel.name} gives a row other bits for every number of rows beside it")
        return buckets

    def _even_buckets(self) -> tuple[int, ...]:
        """Buckets at which every activation is a whole number of vectors, so no element meets a kernel's remainder loop."""
        widths = {self._checkpoint.hidden_size}
        for number in range(self._span.start, self._span.end):
            slot = self._span.slots[number]
            for _, _, layer in linear_modules(slot):
                weight = layer.weight
                assert isinstance(weight, torch.Tensor)
                widths |= {width for width in weight.shape if width >= NARROW}
            widths |= expert_widths(slot)
        chunk = VECTOR_ELEMENTS * self._threads
        even = tuple(count for count in BUCKETS if all(count * width % chunk == 0 for width in widths))
        return even or BUCKETS
