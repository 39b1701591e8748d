"""A checkpoint's tensors, mapped into memory rather than read: a page of a file is resident only while it is needed.

While a span is packed, weights are held in their stored and in their packed form. So that both forms exist for one layer
at a time and not for the whole span, each layer's pages are released as soon as the layer is packed. No code writes to a
mapped tensor, so released pages can be read again, from the system's cache or the disk.
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

ReleaseMemory = Callable[[Iterable[torch.Tensor]], None]
"""Releases the memory of tensors that are not needed any more, or not for some time."""

MADV_DONTNEED = 4  # madvise(2)


class MappedTensors:
    """All tensors of some safetensors files. Their pages can be released until `close`."""

    def __init__(self, files: Iterable[Path], widen_later: bool) -> None:
        """Maps the files. `widen_later`: matrices stored in fewer bits than requested stay as stored; see `widen`."""
        self._widen_later = widen_later
        self._regions: list[tuple[int, int]] = []
        self._held = [(path, safe_open(path, framework="pt")) for path in files]  # open handles keep the mappings
        self.tensors: dict[str, LazyTensor] = {}
        for path, handle in self._held:
            names = list(handle.keys())
            self._regions += [_region(path, handle.get_slice(names[0])[...].data_ptr())] if names else []
            self.tensors |= {name: LazyTensor(self, handle.get_slice(name)) for name in names}

    def in_dtype(self, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Returns a file's tensor in the dtype that the model requests, or as stored if `widen` will convert it later."""
        if dtype is None or tensor.dtype is dtype or (self._widen_later and tensor.dim() == 2 and _wider(dtype, tensor)):
            return tensor
        converted = tensor.to(dtype)
        self.release([tensor])
        return converted

    def release(self, tensors: Iterable[torch.Tensor]) -> None:
        """Releases the memory of these tensors' whole pages, where the tensors are mapped; they can still be read."""
        page = mmap.PAGESIZE
        for tensor in tensors:
            first = -(-tensor.data_ptr() // page) * page
            end = (tensor.data_ptr() + tensor.nbytes) // page * page
            if first < end and any(low <= first and end <= high for low, high in self._regions):
                _madvise(first, end - first, MADV_DONTNEED)

    def close(self) -> None:
        """Closes the files; `release` does nothing from now on. Tensors of the files stay valid."""
        self._regions.clear()
        self._held.clear()
        self.tensors.clear()


class LazyTensor:
    """A tensor of a file, with the two calls of transformers' loader: `[...]`, then `to` a dtype."""

    def __init__(self, mapped: MappedTensors, held: Any) -> None:
        self._mapped = mapped
        self._held = held

    def __getitem__(self, whole: object) -> LazyTensor:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._mapped.in_dtype(self._held[...], dtype)


class _WidenedWhileUsed:
    """Widens a linear layer's weight while the layer computes, by hooks around its forward."""

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
    """Converts narrower parameters to `dtype`: linear weights below `layers` only while they compute, all others for good."""
    linear = {id(layer): layer for _, _, layer in linear_modules(layers)}
    widened: dict[int, nn.Parameter] = {}  # by the narrow parameter's id, so that tied parameters stay tied
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is None or not _wider(dtype, held):
                continue
            if id(module) in linear and name == "weight":
                _WidenedWhileUsed(module, dtype)
                continue
            if id(held) not in widened:
                widened[id(held)] = nn.Parameter(held.data.to(dtype), requires_grad=False)
            module._parameters[name] = widened[id(held)]


def _wider(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    return dtype is torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)


def _region(path: Path, address: int) -> tuple[int, int]:
    """Returns the file's mapping (first, end) that contains the address; (0, 0) where there is none, or no /proc to read."""
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


def trim_heap() -> None:
    """Returns freed memory to the system: packing makes large temporary copies, whose memory the heap would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _madvise(address: int, size_bytes: int, advice: int) -> None:
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call(address, size_bytes, advice)
