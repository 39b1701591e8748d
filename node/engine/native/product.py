"""Products with weights in the compiled kernel's own order: any number of rows, the same bits for each, and on every CPU.

Weights are held as they are stored where that is exact: float32 arithmetic over a bfloat16 checkpoint reads two bytes a
weight. INT8 keeps one scale an output, INT4 one for 32 inputs of an output; both round, and only when asked for. Their rows
are rounded too, to whole numbers of eight bits with one scale for 32 inputs, so that products are sums of whole numbers.
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
PIECE_ELEMENTS = 1 << 18  # packed at a time,
MIN_PANELS = 4  # but so many panels at least, for each thread takes whole ones
MAX_INT8 = 127
MAX_INT4 = 7
DTYPES = {WeightKind.BF16: torch.bfloat16, WeightKind.FP16: torch.float16, WeightKind.FP32: torch.float32}
BYTES = {WeightKind.BF16: 2.0, WeightKind.FP32: 4.0, WeightKind.FP16: 2.0, WeightKind.INT8: 1.0, WeightKind.INT4: 0.5}


class WeightSource(Protocol):
    """`[outputs, inputs]`: a tensor, or what is made of several as it is packed."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, outputs: slice) -> torch.Tensor: ...


class NativeProduct:
    """A product with one packed weight."""

    def __init__(self, weight: WeightSource, bias: torch.Tensor | None, quantize: str = "none") -> None:
        """`weight` `[outputs, inputs]`, bfloat16, float16 or float32.

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
        """Packs some panels at a time; gives the scales as the kernel reads them."""
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
        """`[rows, inputs] -> [rows, outputs]`, in the rows' dtype."""
        return self._into(rows, None)

    def wide(self, rows: torch.Tensor) -> torch.Tensor:
        """The product in float32, not rounded to the rows' dtype."""
        return self._into(rows, None, wide=True)

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """`other + product`, rounded once."""
        return self._into(rows, other.contiguous())

    def _into(self, rows: torch.Tensor, other: torch.Tensor | None, wide: bool = False) -> torch.Tensor:
        rows = rows.contiguous()
        out = rows.new_empty(rows.shape[0], self.outputs, dtype=torch.float32 if wide else None)
        bf16 = rows.dtype is torch.bfloat16
        added = None if other is None else other.data_ptr()
        self._library.product(
            self._at, rows.data_ptr(), rows.shape[0], bf16, added, out.data_ptr(), bf16 and not wide, torch.get_num_threads()
        )
        return out


def _pieces(weight: WeightSource) -> Iterator[tuple[int, torch.Tensor]]:
    """Whole panels at a time, with the number of their first output: a copy of all of a weight would take much room."""
    outputs, inputs = weight.shape
    step = max(MIN_PANELS, PIECE_ELEMENTS // inputs // PANEL) * PANEL
    for first in range(0, outputs, step):
        yield first, weight[first : min(first + step, outputs)]


def _kind(weight: WeightSource, quantize: str) -> WeightKind:
    """How a weight is held: in the fewest bits that are exact, unless it is to be rounded."""
    if quantize != "none":
        return {"int8": WeightKind.INT8, "int4": WeightKind.INT4}[quantize]
    for kind, dtype in ((WeightKind.BF16, torch.bfloat16), (WeightKind.FP16, torch.float16)):
        if weight.dtype is dtype or all(torch.equal(piece.to(dtype).float(), piece.float()) for _, piece in _pieces(weight)):
            return kind
    return WeightKind.FP32


def _held(piece: torch.Tensor, kind: WeightKind) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The elements of some outputs as they are packed, and their scales."""
    match kind:
        case WeightKind.INT8:
            return int8_of(piece)
        case WeightKind.INT4:
            return int4_of(piece)
        case _:
            return piece.to(DTYPES[kind]), None


def int8_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers `[outputs, inputs]` and scales `[outputs]`: the largest weight of each output becomes 127 or -127."""
    weight = weight.float()
    scale = weight.abs().amax(1).div_(MAX_INT8).clamp_min_(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def int4_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers `[outputs, inputs]` from -7 to 7 and scales `[outputs, ceil(inputs / 32)]`."""
    outputs, inputs = weight.shape
    groups = F.pad(weight.float(), (0, -inputs % STEP)).view(outputs, -1, STEP)
    scale = groups.abs().amax(2).div_(MAX_INT4).clamp_min_(torch.finfo(torch.float32).tiny)
    numbers = (groups / scale[:, :, None]).round_().to(torch.int8)
    return numbers.view(outputs, -1)[:, :inputs].contiguous(), scale


def _zeros(outputs: int, inputs: int, kind: WeightKind) -> torch.Tensor:
    """Room for the packed weight, aligned."""
    size_bytes = int(-(-outputs // PANEL) * PANEL * -(-inputs // STEP) * STEP * BYTES[kind])
    return zeroed(size_bytes)
