"""Packs a loaded span layer by layer, so that no more than one layer is held in both forms.

A layer may be packed once nothing reads its own weights any more: the reference of the self-check runs the plain layers in
order, and each is packed right after it has run. The row counts on which all layers agree are found after the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from node.engine.model.checkpoint import Checkpoint
from node.engine.model.compiled_layers import NativeLayer, NativeLayers, has_compiled_form, native_layer, native_layers
from node.engine.model.experts import expert_widths, pack_experts, place_routers
from node.engine.model.fused_llama import FORMS, FusedLlama, fuse_llama
from node.engine.model.linear import (
    BUCKETS,
    FEW_OUTPUTS,
    VECTOR_ELEMENTS,
    Kernel,
    PackedLinear,
    agreeing_buckets,
    linear_modules,
    pack,
    pack_siblings,
    siblings,
)
from node.engine.model.mapped import ReleaseMemory, trim_heap

MAX_HEAD_ROWS = 64  # the head computes one row a sequence, so larger buckets need no trial on its many columns


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
    """The packed form of a span."""

    buckets: tuple[int, ...]
    fused: FusedLlama | NativeLayers | None
    layer_products: list[PackedLinear]  # empty where the layers are compiled as a whole
    has_unpacked_weights: bool  # of matrices whose products may differ by batch


class SpanPacker:
    """Packs one span: `layer` for each of its layers in any order, then `finish`."""

    def __init__(
        self,
        span: PrunedSpan,
        checkpoint: Checkpoint,
        kernel: Kernel,
        threads: int,
        release: ReleaseMemory,
        packed: Callable[[], None],
        whole: bool = True,
    ) -> None:
        """`release` frees tensors that are not needed any more; `packed` is called after each layer; `whole`: not a shard."""
        self._span = span
        self._checkpoint = checkpoint
        self._kernel = kernel
        self._threads = threads
        self._device = next(span.model.parameters()).device
        self._release = release
        self._on_packed = packed
        may_compile = whole and kernel.compiled and checkpoint.config.model_type in FORMS
        self._compiled = may_compile and has_compiled_form(span.model, span.base, span.slots, span.start, span.end)
        self._candidates = () if self._compiled else self._whole_vector_buckets()
        self._native: dict[int, NativeLayer] = {}
        self._layer_products: list[PackedLinear] = []

    def layer(self, number: int) -> None:
        """Packs one layer.

        Raises:
            ValueError: this kernel cannot hold the weights.
        """
        slot = self._span.slots[number]
        own = [parameter.data for parameter in slot.parameters()]
        self._release(own)  # the reference has read all of them
        if self._compiled:
            self._native[number] = native_layer(slot, self._span.model.config, self._kernel.quantize, self._release)
        else:
            self._layer_products += pack_experts(slot, self._kernel)
            self._layer_products += [pack_siblings(parent, names, self._kernel) for parent, names in siblings(slot)]
            for parent, name, layer in linear_modules(slot):
                self._layer_products.append(pack(layer, self._kernel))
                setattr(parent, name, self._layer_products[-1])
            self._release(own)
        del own
        trim_heap()
        self._on_packed()

    def finish(self) -> PackedSpan:
        """Packs the head and other weights around the layers, after all layers.

        Raises:
            ValueError: this kernel cannot hold the weights, or no two row counts agree.
        """
        model, slots = self._span.model, self._span.slots
        assert not self._compiled or len(self._native) == self._span.end - self._span.start, "every layer is packed"
        outer = [parameter.data for parameter in model.parameters()]
        try:
            if self._compiled:
                return PackedSpan(
                    (1,), native_layers(model, self._span.base, self._native, self._kernel), [], has_unpacked_weights=False
                )
            place_routers(slots, self._threads)
            buckets = self._settle_buckets()
            fused = fuse_llama(model, self._span.base, slots, self._span.start, self._span.end)
            return PackedSpan(
                buckets, fused, self._layer_products, has_unpacked_weights=any(tensor.dim() > 2 for tensor in slots.parameters())
            )
        finally:
            self._release(outer)

    def _settle_buckets(self) -> tuple[int, ...]:
        """Packs the head and any other linear layer outside the layers; sets the row counts of every product."""
        buckets = self._agreeing(self._layer_products, self._candidates)
        outer = []
        for parent, name, layer in linear_modules(self._span.model):
            outer.append(pack(layer, self._kernel))
            setattr(parent, name, outer[-1])
        small = tuple(count for count in buckets if count <= MAX_HEAD_ROWS) or buckets
        agreed = self._agreeing(outer, small)
        settled = tuple(count for count in buckets if count in agreed or count not in small)
        for packed in self._layer_products:
            packed.buckets = settled
        for packed in outer:
            packed.buckets = agreed
        return settled

    def _agreeing(self, layers: list[PackedLinear], buckets: tuple[int, ...]) -> tuple[int, ...]:
        """Returns those of `buckets` on which one layer of each shape agrees."""
        tried = set()
        for packed in layers:
            if (packed.in_features, packed.out_features) not in tried:
                tried.add((packed.in_features, packed.out_features))
                for product in (packed.product, packed.plus_itself):
                    buckets = agreeing_buckets(product, packed.in_features, self._kernel.dtype, buckets, self._device)
        if not buckets:
            raise ValueError(f"{self._kernel.name} gives a row other bits for every number of rows beside it")
        return buckets

    def _whole_vector_buckets(self) -> tuple[int, ...]:
        """Returns buckets with which every activation is a whole number of vectors: no kernel then uses its remainder loop."""
        widths = {self._checkpoint.hidden_size}
        for number in range(self._span.start, self._span.end):
            slot = self._span.slots[number]
            for _, _, layer in linear_modules(slot):
                weight = layer.weight
                assert isinstance(weight, torch.Tensor)
                widths |= {width for width in weight.shape if width >= FEW_OUTPUTS}
            widths |= expert_widths(slot)
        chunk = VECTOR_ELEMENTS * self._threads
        even = tuple(count for count in BUCKETS if all(count * width % chunk == 0 for width in widths))
        return even or BUCKETS
