"""A checkpoint's tensors, mapped into memory rather than read: a page of a file is resident only while it is needed.

What is computed with is held twice for a while, as it is stored and as it is packed. So that this concerns one layer at a
time and not the whole span, each layer's pages are let go as soon as the layer is packed. No code writes to a mapped tensor:
pages that were let go are read again from the system's cache, or the disk, where they are needed after all.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from node.engine.model.linear import linear_modules

LetGo = Callable[[Iterable[torch.Tensor]], None]
"""Gives back the memory of tensors that are not needed any more, or not for now."""

MADV_DONTNEED = 4  # madvise(2)


class MappedTensors:
    """All tensors of some safetensors files. Their pages can be let go as long as this object lives."""

    def __init__(self, files: Iterable[Path], widens_late: bool) -> None:
        """`widens_late`: matrices that are stored narrower than they are wanted come as they are stored; see `widen`."""
        self._widens_late = widens_late
        self._regions: list[tuple[int, int]] = []
        self._held = [(path, safe_open(path, framework="pt")) for path in files]  # open handles keep the regions ours
        self.tensors: dict[str, LazyTensor] = {}
        for path, handle in self._held:
            names = list(handle.keys())
            self._regions += [_region(path, handle.get_slice(names[0])[...].data_ptr())] if names else []
            self.tensors |= {name: LazyTensor(self, handle.get_slice(name)) for name in names}

    def taken(self, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """A tensor of a file in the dtype that the model asks for, or for now as it is stored."""
        if dtype is None or tensor.dtype is dtype or (self._widens_late and tensor.dim() == 2 and _wider(dtype, tensor)):
            return tensor
        converted = tensor.to(dtype)
        self.let_go([tensor])
        return converted

    def let_go(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives back the memory of these tensors' whole pages, where they are mapped ones; they can still be read."""
        page = mmap.PAGESIZE
        for tensor in tensors:
            first = -(-tensor.data_ptr() // page) * page
            end = (tensor.data_ptr() + tensor.nbytes) // page * page
            if first < end and any(low <= first and end <= high for low, high in self._regions):
                _madvise(first, end - first, MADV_DONTNEED)

    def close(self) -> None:
        """Lets go of nothing any more. Tensors of the files stay good."""
        self._regions.clear()
        self._held.clear()
        self.tensors.clear()


class LazyTensor:
    """A tensor of a file as transformers' loader takes it: first all of it, `[...]`, then in a dtype."""

    def __init__(self, mapped: MappedTensors, held: Any) -> None:
        self._mapped = mapped
        self._held = held

    def __getitem__(self, whole: object) -> LazyTensor:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._mapped.taken(self._held[...], dtype)


class _InUse:
    """Widens a linear layer's weight for as long as it computes."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        held = layer.weight
        assert isinstance(held, nn.Parameter)
        self._held = held
        layer.register_forward_pre_hook(self._widen)
        layer.register_forward_hook(self._restore, always_call=True)

    def _widen(self, layer: nn.Module, given: object) -> None:
        layer.weight = nn.Parameter(self._held.data.to(self._dtype), requires_grad=False)

    def _restore(self, layer: nn.Module, given: object, answer: object) -> None:
        layer.weight = self._held


def widen(model: nn.Module, layers: nn.Module, dtype: torch.dtype) -> None:
    """Brings what came narrower into `dtype`: linear weights below `layers` only while they compute, all others for good."""
    late = {id(layer): layer for _, _, layer in linear_modules(layers)}
    widened: dict[int, nn.Parameter] = {}  # tied ones once
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is None or not _wider(dtype, held):
                continue
            if id(module) in late and name == "weight":
                _InUse(module, dtype)
                continue
            if id(held) not in widened:
                widened[id(held)] = nn.Parameter(held.data.to(dtype), requires_grad=False)
            module._parameters[name] = widened[id(held)]


def _wider(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    return dtype is torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)


def _region(path: Path, address: int) -> tuple[int, int]:
    """The mapping of the file that holds the address; an empty one where the system does not tell, or the tensor is a copy."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        bounds, *_, name = line.split(maxsplit=5)
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= address < high:
            return (low, high) if name == str(path.resolve()) else (0, 0)
    return 0, 0


def give_back_freed() -> None:
    """Gives freed memory back to the system: layers are packed through large copies, whose room would else be kept in parts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _madvise(address: int, size_bytes: int, advice: int) -> None:
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call(address, size_bytes, advice)
