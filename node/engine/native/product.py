"""Products with weights in the compiled kernel's own order: any number of rows, the same bits for each, and on every CPU.

Weights are held as they are stored where that is exact: float32 arithmetic over a bfloat16 checkpoint reads two bytes a
weight. INT8 keeps one scale an output, INT4 one for 32 inputs of an output; both round, and only when asked for.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import torch
import torch.nn.functional as F

from node.engine.native.library import Kind, Library, ProductParts, native

PANEL = 32  # outputs computed together, as in mesh.h
STEP = 32  # inputs summed together
ALIGNMENT = 64
OWN_MAPPING_BYTES = 1 << 20
PIECE_ELEMENTS = 1 << 18
LARGEST_INT8 = 127
LARGEST_INT4 = 7
BYTES = {Kind.BF16: 2.0, Kind.FP32: 4.0, Kind.FP16: 2.0, Kind.INT8: 1.0, Kind.INT4: 0.5}


class NativeProduct:
    """A product with one packed weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, quantize: str = "none") -> None:
        """`weight` `[outputs, inputs]`, bfloat16, float16 or float32.

        Raises:
            RuntimeError: there is no compiled kernel here.
        """
        library = native()
        if library is None:
            raise RuntimeError("no compiled kernel on this machine")
        self._library: Library = library
        self.outputs, self.inputs = weight.shape
        self.kind, held, self._scale = _held(weight, quantize)
        self._packed = _zeros(self.outputs, self.inputs, self.kind)
        held = held.contiguous()
        library.pack(self.kind, held.data_ptr(), self.outputs, self.inputs, self._packed.data_ptr(), torch.get_num_threads())
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


def _held(weight: torch.Tensor, quantize: str) -> tuple[Kind, torch.Tensor, torch.Tensor | None]:
    """How a weight is held, its elements, and the scales as the kernel reads them."""
    if quantize == "int8":
        elements, scale = _in_pieces(int8_of, weight)
        return Kind.INT8, elements, F.pad(scale, (0, -weight.shape[0] % PANEL))
    if quantize == "int4":
        elements, scale = _in_pieces(int4_of, weight)
        padded = F.pad(scale, (0, 0, 0, -weight.shape[0] % PANEL))  # [panels * 32, steps]
        return Kind.INT4, elements, padded.view(-1, PANEL, padded.shape[1]).transpose(1, 2).contiguous()
    if weight.dtype is torch.bfloat16:
        return Kind.BF16, weight, None
    weight = weight.float()
    if torch.equal(weight.bfloat16().float(), weight):
        return Kind.BF16, weight.bfloat16(), None
    if torch.equal(weight.half().float(), weight):
        return Kind.FP16, weight.half(), None
    return Kind.FP32, weight, None


def _in_pieces(
    quantised: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some outputs at a time, which do not depend on one another: in float32 the whole would take many times its room."""
    pieces = [quantised(piece) for piece in weight.split(max(1, PIECE_ELEMENTS // weight.shape[1]))]
    return torch.cat([numbers for numbers, _ in pieces]), torch.cat([scale for _, scale in pieces])


def int8_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers `[outputs, inputs]` and scales `[outputs]`: the largest weight of each output becomes 127 or -127."""
    weight = weight.float()
    scale = weight.abs().amax(1).div_(LARGEST_INT8).clamp_min_(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def int4_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers `[outputs, inputs]` from -7 to 7 and scales `[outputs, ceil(inputs / 32)]`."""
    outputs, inputs = weight.shape
    groups = F.pad(weight.float(), (0, -inputs % STEP)).view(outputs, -1, STEP)
    scale = groups.abs().amax(2).div_(LARGEST_INT4).clamp_min_(torch.finfo(torch.float32).tiny)
    numbers = (groups / scale[:, :, None]).round_().to(torch.int8)
    return numbers.view(outputs, -1)[:, :inputs].contiguous(), scale


def _zeros(outputs: int, inputs: int, kind: Kind) -> torch.Tensor:
    """Room for the packed weight, aligned.

    A large one gets a mapping of its own, in large pages where the system has them: it stays while what is allocated
    beside it in a load goes, and would leave holes in a heap that they share.
    """
    size_bytes = int(-(-outputs // PANEL) * PANEL * -(-inputs // STEP) * STEP * BYTES[kind])
    if size_bytes >= OWN_MAPPING_BYTES:
        mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(mapping, dtype=torch.uint8)
    room = torch.zeros(size_bytes + ALIGNMENT, dtype=torch.uint8)
    return room[-room.data_ptr() % ALIGNMENT :][:size_bytes]
