"""The Python interface of the compiled kernel: the structures of mesh.h and the functions of entry.c. Calls release the GIL."""

from __future__ import annotations

import ctypes
import functools
from ctypes import CDLL, POINTER, c_float, c_int, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path

import structlog

from node.engine.native.build import CannotBuild, built
from node.host.environment import cache_home, cpu_isa
from node.host.uncompiled import COSTS, TURNED_OFF, remedy

log = structlog.get_logger()


class Isa(IntEnum):
    """The instructions that compute products; all give the same bits."""

    NONE = 0
    AVX2 = 1
    AVX512 = 2
    AMX = 3


class WeightKind(IntEnum):
    """How packed weights are stored."""

    BF16 = 0
    FP32 = 1
    FP16 = 2
    INT8 = 3
    INT4 = 4


class ProductParts(ctypes.Structure):
    """`product_t`."""

    _fields_ = (
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("kind", c_int64),
    )


class LayerParts(ctypes.Structure):
    """`layer_t`."""

    _fields_ = (
        ("before_attention", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("before_mlp", c_void_p),
        ("qkv", ProductParts),
        ("out", ProductParts),
        ("gate_up", ProductParts),
        ("down", ProductParts),
        ("eps", c_float),
        ("head_eps", c_float),
        ("scale", c_float),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("intermediate", c_int64),
        ("window", c_int64),
    )


class SpanParts(ctypes.Structure):
    """`spans_t`."""

    _fields_ = (
        ("spans", c_int64),
        ("row", c_void_p),
        ("count", c_void_p),
        ("position", c_void_p),
        ("stride", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class NativeLibrary:
    """The functions of entry.c. Pointers refer to tensors, which the caller must keep alive."""

    def __init__(self, path: Path, max_isa: Isa = Isa.AMX) -> None:
        """Loads the library. `max_isa`: the best instructions that it may use.

        Raises:
            OSError: it cannot be loaded.
        """
        loaded = CDLL(str(path))
        self.use = loaded.mesh_use
        self.use.argtypes, self.use.restype = (c_int,), c_int
        self.pack = loaded.mesh_pack
        self.pack.argtypes = (c_int, c_void_p, c_int64, c_int64, c_void_p, c_int)
        self.product = loaded.mesh_product
        self.product.argtypes = (POINTER(ProductParts), c_void_p, c_int64, c_int, c_void_p, c_void_p, c_int, c_int)
        self.layers = loaded.mesh_layers
        spans = POINTER(SpanParts)
        self.layers.argtypes = (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int, spans, c_int)
        self.logits = loaded.mesh_logits
        self.logits.argtypes = (POINTER(ProductParts), c_void_p, c_float, c_void_p, c_int64, c_int, c_void_p, c_int)
        for function in (self.pack, self.product, self.layers, self.logits):
            function.restype = None
        self.isa = Isa(self.use(max_isa))


def native() -> NativeLibrary | None:
    """Returns the compiled kernel, which the first call of a user builds; None where there is none (`absence`: why)."""
    return _opened()[0]


def absence() -> str:
    """Returns why there is no compiled kernel in this process; empty where there is one."""
    return _opened()[1]


@functools.cache
def _opened() -> tuple[NativeLibrary | None, str]:
    """Returns the compiled kernel and "", or None and the reason, which is logged once."""
    try:
        library: NativeLibrary | None = _open()
        reason = ""
    except (CannotBuild, OSError) as error:
        library, reason = None, " ".join(str(error).split())[:300]
        log.warning("no compiled kernel", reason=reason, costs=COSTS, do=remedy(reason))
    return library, reason


def _open() -> NativeLibrary:
    max_isa = Isa[cpu_isa().upper()]
    if max_isa is Isa.NONE:
        raise CannotBuild(TURNED_OFF)
    library = NativeLibrary(built(cache_home()), max_isa)
    if library.isa is Isa.NONE:
        raise CannotBuild("this CPU lacks AVX2, FMA or F16C")
    return library
