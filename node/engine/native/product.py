"""Products by the compiled kernel, with packed weights: the same bits for a row in every batch and on every CPU.

Weights are held in the smallest type that is exact: float32 arithmetic over a bfloat16 checkpoint reads two bytes a weight.
INT8 has one scale per output, INT4 one per 32 inputs of an output; both round, and only on request. With them, rows are
rounded too, to integers of eight bits with one scale per 32 inputs, so that products are sums of integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from node.engine.native.arena import zeroed
from node.engine.native.library import NativeLibrary, ProductParts, WeightKind, absence, native

PANEL = 32  # outputs computed together, as in mesh.h
STEP = 32  # inputs summed together
PIECE_ELEMENTS = 1 << 18  # how many are packed at a time,
MIN_PANELS = 4  # but at least so many panels, for each thread packs whole ones
MAX_INT8 = 127
MAX_INT4 = 7
DTYPES = {WeightKind.BF16: torch.bfloat16, WeightKind.FP16: torch.float16, WeightKind.FP32: torch.float32}
BYTES = {WeightKind.BF16: 2.0, WeightKind.FP32: 4.0, WeightKind.FP16: 2.0, WeightKind.INT8: 1.0, WeightKind.INT4: 0.5}


class WeightSource(Protocol):
    """A weight `[outputs, inputs]`: a tensor, or rows of several tensors that are combined as they are read."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, outputs: slice) -> torch.Tensor: ...


class NativeProduct:
    """A product with one packed weight."""

    def __init__(self, weight: WeightSource, bias: torch.Tensor | None, quantize: str = "none") -> None:
        """Packs `weight` `[outputs, inputs]`, bfloat16, float16 or float32. `quantize`: none, int8 or int4.

        Raises:
            RuntimeError: there is no compiled kernel here.
        """
        library = native()
        if library is None:
            raise RuntimeError(f"there is no compiled kernel: {absence()}")
        self._library: NativeLibrary = library
        self.outputs, self.inputs = weight.shape
        self.kind = _kind(weight, quantize)
        self._packed = _zeros(self.outputs, self.inputs, self.kind)
        self._scale = self._pack(weight)
        self._bias = None if bias is None else F.pad(bias.detach().float(), (0, -self.outputs % PANEL))
        self.parts = ProductParts(
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            None if self._scale is None else self._scale.data_ptr(),
            self.outputs,
            self.inputs,
            self.kind,
        )
        self._at = ctypes.byref(self.parts)

    def _pack(self, weight: WeightSource) -> torch.Tensor | None:
        """Packs the weight piece by piece; returns the scales in the kernel's order, or None."""
        panel_bytes = self._packed.numel() // -(-self.outputs // PANEL)
        scales = []
        for first, piece in _pieces(weight):
            held, scale = _held(piece, self.kind)
            scales += [] if scale is None else [scale]
            at = self._packed.data_ptr() + first // PANEL * panel_bytes
            held = held.contiguous()
            self._library.pack(self.kind, held.data_ptr(), len(held), self.inputs, at, torch.get_num_threads())
        if not scales:
            return None
        scale = F.pad(torch.cat(scales), (0, 0) * (scales[0].dim() - 1) + (0, -self.outputs % PANEL))
        if self.kind is WeightKind.INT8:
            return scale
        return scale.view(-1, PANEL, scale.shape[1]).transpose(1, 2).contiguous()  # from [panels * 32, steps]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Computes `[rows, inputs] -> [rows, outputs]`, in the rows' dtype."""
        return self._into(rows, None)

    def wide(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the product in float32, not rounded to the rows' dtype."""
        return self._into(rows, None, wide=True)

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Returns `other + product`, rounded once."""
        return self._into(rows, other.contiguous())

    def _into(self, rows: torch.Tensor, other: torch.Tensor | None, wide: bool = False) -> torch.Tensor:
        assert rows.shape[1] == self.inputs
        rows = rows.contiguous()
        out = rows.new_empty(rows.shape[0], self.outputs, dtype=torch.float32 if wide else None)
        bf16 = rows.dtype is torch.bfloat16
        added = None if other is None else other.data_ptr()
        self._library.product(
            self._at, rows.data_ptr(), rows.shape[0], bf16, added, out.data_ptr(), bf16 and not wide, torch.get_num_threads()
        )
        return out


def _pieces(weight: WeightSource) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields pieces of whole panels with the number of their first output: a copy of the whole weight would take much memory."""
    outputs, inputs = weight.shape
    step = max(MIN_PANELS, PIECE_ELEMENTS // inputs // PANEL) * PANEL
    for first in range(0, outputs, step):
        yield first, weight[first : min(first + step, outputs)]


def _kind(weight: WeightSource, quantize: str) -> WeightKind:
    """Returns how a weight is stored: in the fewest bits that are exact, or as `quantize` requests."""
    if quantize != "none":
        return {"int8": WeightKind.INT8, "int4": WeightKind.INT4}[quantize]
    for kind, dtype in ((WeightKind.BF16, torch.bfloat16), (WeightKind.FP16, torch.float16)):
        if weight.dtype is dtype or all(torch.equal(piece.to(dtype).float(), piece.float()) for _, piece in _pieces(weight)):
            return kind
    return WeightKind.FP32


def _held(piece: torch.Tensor, kind: WeightKind) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the elements of some outputs in the packed type, and their scales."""
    match kind:
        case WeightKind.INT8:
            return int8_of(piece)
        case WeightKind.INT4:
            return int4_of(piece)
        case _:
            return piece.to(DTYPES[kind]), None


def int8_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to integers `[outputs, inputs]` and scales `[outputs]`: the largest weight of each output becomes 127 or -127."""
    weight = weight.float()
    scale = weight.abs().amax(1).div_(MAX_INT8).clamp_min_(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def int4_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to integers `[outputs, inputs]` from -7 to 7 and scales `[outputs, ceil(inputs / 32)]`."""
    outputs, inputs = weight.shape
    groups = F.pad(weight.float(), (0, -inputs % STEP)).view(outputs, -1, STEP)
    scale = groups.abs().amax(2).div_(MAX_INT4).clamp_min_(torch.finfo(torch.float32).tiny)
    numbers = (groups / scale[:, :, None]).round_().to(torch.int8)
    return numbers.view(outputs, -1)[:, :inputs].contiguous(), scale


def _zeros(outputs: int, inputs: int, kind: WeightKind) -> torch.Tensor:
    """Allocates the packed weight, aligned."""
    size_bytes = int(-(-outputs // PANEL) * PANEL * -(-inputs // STEP) * STEP * BYTES[kind])
    return zeroed(size_bytes)
