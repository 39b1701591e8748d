"""Linear layers with prepacked weights that give a row the same bits in every batch.

`nn.Linear` reads its weights at a quarter to a third of the memory's bandwidth on CPUs; weights that oneDNN has
reordered once were read at about 80 % where it was measured. But a library chooses its kernel by the number of rows, and
kernels round differently. So rows are padded to a few row counts, the *buckets*, for which `agreeing_buckets` has found
every row to be bit-equal, at any place. Which buckets agree differs from CPU to CPU, so it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from node.engine.device import CPU
from node.engine.native.product import NativeProduct, int8_of

BUCKETS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MAX_FP16 = 65504.0
TRIAL_ROWS = 16
VECTOR_ELEMENTS = (
    64  # two AVX-512 vectors of bf16: an elementwise kernel's loop takes so many; its remainder loop rounds otherwise
)
FEW_OUTPUTS = 16  # products with fewer outputs pad each row of their result

Rows = Callable[[torch.Tensor], torch.Tensor]
"""`[rows, inputs] -> [rows, outputs]`."""

Pack = Callable[[torch.Tensor, torch.Tensor | None], Rows]
"""Takes a weight `[outputs, inputs]` and a bias; returns the product with them."""


class OneDnnProduct:
    """A product with a weight that oneDNN has reordered."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._product_plus = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._product(rows, self._packed, self._bias, "none", [], "")
        return out

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Returns `other + product`, rounded once: the kernel adds before it stores the product."""
        out: torch.Tensor = self._product_plus(rows, other, self._packed, self._bias, "add")
        return out


def _pack_fbgemm_fp16(weight: torch.Tensor, bias: torch.Tensor | None) -> Rows:
    if weight.abs().max().item() > MAX_FP16:
        raise ValueError("a weight is too large for float16")
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), None if bias is None else bias.float())
    product = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda rows: product(rows, packed)


class AtenInt8Product:
    """A product with weights of eight bits and one scale per output; the same bits for any number of rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        numbers, scale = int8_of(weight)
        self._numbers = numbers.contiguous()
        self._scale = scale.to(weight.dtype)
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, self._numbers, self._scale)
        return out if self._bias is None else out.add_(self._bias)


def _pack_aten(weight: torch.Tensor, bias: torch.Tensor | None) -> Rows:
    weight = weight.contiguous()
    return lambda rows: F.linear(rows, weight, bias)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel for linear layers; `dtype` is that of the rows and of all activations.

    `compiled`: the kernel of node/engine/native, which also computes whole layers of Llama-shaped models. `attention`: the
    kernel is for GPUs, with this attention over block tables (node/engine/paged).
    """

    name: str
    dtype: torch.dtype
    pack: Pack
    quantize: str = "none"
    compiled: bool = False
    attention: str = ""


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("mesh-bf16", torch.bfloat16, NativeProduct, compiled=True),
        Kernel("mesh-fp32", torch.float32, NativeProduct, compiled=True),
        Kernel("mesh-int8", torch.bfloat16, partial(NativeProduct, quantize="int8"), "int8", compiled=True),
        Kernel("mesh-int4", torch.bfloat16, partial(NativeProduct, quantize="int4"), "int4", compiled=True),
        Kernel("mesh-int8-fp32", torch.float32, partial(NativeProduct, quantize="int8"), "int8", compiled=True),
        Kernel("mesh-int4-fp32", torch.float32, partial(NativeProduct, quantize="int4"), "int4", compiled=True),
        Kernel("aten-int8", torch.bfloat16, AtenInt8Product, "int8"),
        Kernel("onednn-fp32", torch.float32, OneDnnProduct),
        Kernel("onednn-bf16", torch.bfloat16, OneDnnProduct),
        Kernel("fbgemm-fp16", torch.float32, _pack_fbgemm_fp16),
        Kernel("aten-fp32", torch.float32, _pack_aten),
        Kernel("aten-bf16", torch.bfloat16, _pack_aten),
        Kernel("cuda-bf16", torch.bfloat16, _pack_aten, attention="flash"),
        Kernel("cuda-bf16-tiled", torch.bfloat16, _pack_aten, attention="tiled"),
        Kernel("cuda-fp32", torch.float32, _pack_aten, attention="tiled"),
    )
}


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear` or a GPT-2 `Conv1D`; has no parameters, for the packed weight is opaque."""

    def __init__(self, product: Rows, in_features: int, out_features: int, buckets: tuple[int, ...]) -> None:
        super().__init__()
        self.product = product
        self.in_features = in_features
        self.out_features = out_features
        self.buckets = buckets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes `[…, inputs] -> […, outputs]`, with rows padded to a bucket, or in pieces of the largest bucket."""
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        if count in self.buckets:
            return self.product(rows).view(*x.shape[:-1], self.out_features)
        largest = self.buckets[-1]
        pieces = [self._padded(rows[at : at + largest]) for at in range(0, count, largest)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(*x.shape[:-1], self.out_features)

    def full(self, rows: torch.Tensor) -> torch.Tensor:
        """Computes `forward` for `[rows, inputs]`, where `rows` is a bucket or a multiple of the largest."""
        return self.product(rows) if rows.shape[0] <= self.buckets[-1] else self.forward(rows)

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Returns `other + product` for `[rows, inputs]`, where `rows` is as in `full`; in one call where the kernel can.

        This saves each of a layer's two residual additions a separate pass, 10 to 20 microseconds a step.
        """
        plus: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = getattr(self.product, "plus", self._product_then_add)
        largest = self.buckets[-1]
        count = rows.shape[0]
        if count <= largest:
            return plus(rows, other)
        return torch.cat([plus(rows[at : at + largest], other[at : at + largest]) for at in range(0, count, largest)])

    def _product_then_add(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other + self.product(rows)

    def plus_itself(self, rows: torch.Tensor) -> torch.Tensor:
        """Adds the product to itself: tries `plus` with a second operand that depends on the row alone."""
        return self.plus(rows, self.product(rows))

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[0]
        short = bucket_for(count, self.buckets) - count
        return self.product(F.pad(rows, (0, 0, 0, short)) if short else rows)[:count]


class FewOutputsLinear(PackedLinear):
    """A product with few outputs, e.g. the gate of a shared expert.

    An elementwise kernel over such a result would mix rows within one vector, so that a row's rounding could depend on its
    place. One column of padding behind each row makes the kernel process row by row.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(super().forward(x), (0, 1))[..., :-1]


def bucket_for(rows: int, buckets: tuple[int, ...]) -> int:
    """Returns the smallest bucket that holds `rows`; beyond the largest bucket, a multiple of it."""
    for bucket in buckets:
        if rows <= bucket:
            return bucket
    return -(-rows // buckets[-1]) * buckets[-1]


def agreeing_buckets(
    product: Rows, inputs: int, dtype: torch.dtype, candidates: tuple[int, ...] = BUCKETS, device: torch.device = CPU
) -> tuple[int, ...]:
    """Returns the row counts among `candidates` for which a product gives every row the same bits as for the others.

    `TRIAL_ROWS` distinct rows, enough to meet rare roundings, are repeated to fill each count, from the end backwards, so
    every row stands at many places and small counts hold the first rows. Each count is compared with every count that
    holds all distinct rows; the largest set that agrees is returned, the first of equally large ones, and none of one count.
    """
    distinct = torch.randn(TRIAL_ROWS, inputs, generator=torch.Generator().manual_seed(2024)).to(device, dtype)
    outputs: dict[int, torch.Tensor] = {}
    for count in candidates:
        order = torch.arange(count - 1, -1, -1, device=device) % TRIAL_ROWS
        out = product(distinct[order])
        rows = out[-TRIAL_ROWS:].flip(0)  # rows 0, 1, 2 … of `distinct`
        if torch.equal(rows[order], out):
            outputs[count] = rows
    best: list[int] = []
    compared: set[int] = set()  # a count that agrees with an earlier reference would find the same set
    for number, reference in outputs.items():
        if len(reference) < TRIAL_ROWS or number in compared:
            continue
        agreeing = [count for count, rows in outputs.items() if torch.equal(rows, reference[: len(rows)])]
        compared.update(agreeing)
        if len(agreeing) > len(best):
            best = agreeing
    return tuple(best) if len(best) > 1 else ()


class SharedInput:
    """One product for sibling layers with the same input rows, e.g. a layer's queries, keys and values.

    The first sibling that is called computes all outputs; the others, called with the same tensor object, take their
    columns. Fewer, larger products read the weights faster: half a dozen percent of a decode step.
    """

    def __init__(self, together: PackedLinear, widths: list[int]) -> None:
        self.together = together
        self.widths = widths
        self._last_input: torch.Tensor | None = None
        self._pending_outputs: dict[int, torch.Tensor] = {}

    def take(self, sibling: int, x: torch.Tensor) -> torch.Tensor:
        """Returns the columns of one sibling for the input `x` `[…, inputs]`."""
        if self._last_input is not x or sibling not in self._pending_outputs:
            self._last_input = x
            self._pending_outputs = dict(enumerate(self.together(x).split(self.widths, -1)))
        columns = self._pending_outputs.pop(sibling)
        if not self._pending_outputs:
            self._last_input = None
        return columns


class Sibling(nn.Module):
    """Replaces one of the layers that a `SharedInput` computes together."""

    def __init__(self, shared: SharedInput, number: int) -> None:
        super().__init__()
        self.shared = shared
        self.number = number
        self.in_features = shared.together.in_features
        self.out_features = shared.widths[number]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.take(self.number, x)


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def siblings(root: nn.Module) -> Iterable[tuple[nn.Module, tuple[str, ...]]]:
    """Yields layers below `root` that, by their names, have the same input rows and can be computed as one."""
    for parent in list(root.modules()):
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            if not all(isinstance(layer, nn.Linear) for layer in layers):
                continue
            kinds = {(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}  # type: ignore[union-attr]
            if len(kinds) == 1:
                yield parent, names


def pack_siblings(parent: nn.Module, names: tuple[str, ...], kernel: Kernel) -> PackedLinear:
    """Replaces the named layers by one packed product, which is returned.

    Raises:
        ValueError: the kernel cannot hold these weights.
    """
    layers = [getattr(parent, name) for name in names]
    weight = torch.cat([weight_of(layer, kernel) for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
    together = PackedLinear(kernel.pack(weight, bias), weight.shape[1], weight.shape[0], BUCKETS)
    shared = SharedInput(together, [layer.out_features for layer in layers])
    for number, name in enumerate(names):
        setattr(parent, name, Sibling(shared, number))
    return together


def linear_modules(root: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Module]]:
    """Yields every linear layer below `root` as (parent, name, layer), except routers of experts."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, Conv1D)) and not hasattr(child, "top_k"):
                yield parent, name, child


def weight_of(layer: nn.Module, kernel: Kernel) -> torch.Tensor:
    """Returns the layer's weight as `[outputs, inputs]`, for the kernel to pack; `Conv1D` of GPT-2 stores it transposed."""
    assert isinstance(layer, nn.Linear | Conv1D)
    weight: torch.Tensor = layer.weight.data
    if not kernel.compiled:  # the compiled kernel packs the stored dtype
        weight = weight.to(kernel.dtype)
    return weight.t() if isinstance(layer, Conv1D) else weight


def pack(layer: nn.Module, kernel: Kernel) -> PackedLinear:
    """Packs one linear layer; its buckets are not yet found.

    Raises:
        ValueError: the kernel cannot hold these weights.
    """
    weight = weight_of(layer, kernel)
    held = layer.bias
    bias = held.data if isinstance(held, torch.Tensor) else None
    outputs, inputs = weight.shape
    packed_class = FewOutputsLinear if outputs < FEW_OUTPUTS else PackedLinear
    return packed_class(kernel.pack(weight, bias), inputs, outputs, BUCKETS)
