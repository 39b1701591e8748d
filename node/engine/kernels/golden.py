"""Golden vectors: logits and drawn tokens of a small synthetic model, the same on every machine with correct arithmetic.

Each kind of weights goes through the compiled layers and the sampler, in chunks and in batches, with both types of rows.
The digest of all results is a constant of the program. A machine that finds another digest computes differently, for
whatever reason; its fingerprint then names its CPU and torch, so only equal machines are exact to it
(node.engine.kernels.machine).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from node.engine.kv.cache import KVStore, SequenceKV
from node.engine.model.attention import PackedBatch, Segment
from node.engine.model.compiled_layers import HALF_PANEL, KvSpans
from node.engine.native.library import LayerParts, NativeLibrary, native
from node.engine.native.portable import sin_cos
from node.engine.native.product import NativeProduct
from node.engine.sampling import sampler
from node.requests import SamplingParams

log = structlog.get_logger()

GOLDEN = "2be3dc820c0ba4ec"
HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE, VOCAB = 80, 4, 2, 40, 112, 130  # no multiples of panels, steps or vectors
WINDOW = 48
POSITIONS = 128
STEPS = (70, 1, 1, 33, 1)  # rows of the sequence in each step, in a batch with another sequence of 5 rows
WEIGHTS = (  # the stored type, and how it is rounded
    (torch.bfloat16, "none"),
    (torch.float16, "none"),
    (torch.float32, "none"),
    (torch.bfloat16, "int8"),
    (torch.float32, "int4"),
)
DRAWS = (
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=1.0, seed=5),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.02, seed=6, logprobs=2),
    SamplingParams(temperature=1.5, top_k=20, seed=7, repetition_penalty=1.1, presence_penalty=0.2),
)


class _Numbers:
    """Pseudorandom numbers, exact and the same everywhere: 16-bit integers of a counter-based generator, times a power of two."""

    def __init__(self) -> None:
        self._counter = 0

    def __call__(self, *shape: int, scale: float, middle: float = 0.0) -> torch.Tensor:
        self._counter += 1
        raw = np.random.Philox(key=20_261_201, counter=[0, 0, 0, self._counter]).random_raw(int(np.prod(shape)))
        whole = (raw & np.uint64(0xFFFF)).astype(np.int64) - 32768
        return torch.from_numpy((whole * (scale * 2.0**-15) + middle).astype(np.float32)).view(shape)


@dataclass(frozen=True)
class _Model:
    """Two layers, the second with norms of heads and a window, and a head; `kept` refers to the memory the layers point to."""

    layers: tuple[LayerParts, LayerParts]
    head: NativeProduct
    norm: torch.Tensor
    rotary: torch.Tensor
    kept: list[object]


def _model(stored: torch.dtype, quantize: str) -> _Model:
    numbers = _Numbers()
    kept: list[object] = []

    def product(outputs: int, inputs: int, biased: bool = False) -> NativeProduct:
        weight = numbers(outputs, inputs, scale=2.0 ** (2 - (inputs.bit_length() // 2))).to(stored)
        made = NativeProduct(weight, numbers(outputs, scale=0.25) if biased else None, quantize)
        kept.append(made)
        return made

    def norm(size: int) -> torch.Tensor:
        made = numbers(size, scale=0.5, middle=1.0)
        kept.append(made)
        return made

    def layer(second: bool) -> LayerParts:
        heads = [norm(DIM).data_ptr(), norm(DIM).data_ptr()] if second else [None, None]
        products = (
            product((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, biased=not second),
            product(HIDDEN, HEADS * DIM),
            product(2 * INTERMEDIATE, HIDDEN),
            product(HIDDEN, INTERMEDIATE),
        )
        sizes = (HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE, WINDOW if second else 0)
        parts = (each.parts for each in products)
        return LayerParts(norm(HIDDEN).data_ptr(), *heads, norm(HIDDEN).data_ptr(), *parts, 1e-5, 1e-6, 0.15625, *sizes)

    assert INTERMEDIATE % HALF_PANEL == 0  # gates and ups are interleaved without padding
    frequencies = np.ldexp(1.0, -np.arange(DIM // 2) // 2).astype(np.float64)
    sines, cosines = sin_cos(np.arange(POSITIONS, dtype=np.float64)[:, None] * frequencies)
    rotary = torch.from_numpy(np.stack((cosines, sines), 1).astype(np.float32)).contiguous()
    return _Model((layer(second=False), layer(second=True)), product(VOCAB, HIDDEN), norm(HIDDEN), rotary, kept)


def _logits(library: NativeLibrary, model: _Model, dtype: torch.dtype, threads: int) -> torch.Tensor:
    """Computes the logits of the sequence's last row in each step, `[steps, vocab]` float32."""
    numbers = _Numbers()
    store = KVStore()
    mine, position, out = SequenceKV(store), 0, []
    addresses = (ctypes.c_void_p * 2)(*(ctypes.addressof(layer) for layer in model.layers))
    for count in STEPS:
        segments = [Segment(0, 5, 0, SequenceKV(store)), Segment(5, count, position, mine)]
        where = torch.tensor([*range(5), *range(position, position + count)])
        x = numbers(5 + count, HIDDEN, scale=1.0).to(dtype)
        spans = KvSpans(PackedBatch(segments, 0, 2, None), x.new_empty(0, 2, KV_HEADS, DIM))
        bf16 = dtype is torch.bfloat16
        library.layers(
            addresses,
            2,
            x.data_ptr(),
            where.data_ptr(),
            model.rotary.data_ptr(),
            5 + count,
            bf16,
            ctypes.byref(spans.parts),
            threads,
        )
        logits = torch.empty(1, VOCAB)
        last = x[-1:].contiguous()
        library.logits(
            ctypes.byref(model.head.parts), model.norm.data_ptr(), 1e-5, last.data_ptr(), 1, bf16, logits.data_ptr(), threads
        )
        out.append(logits)
        position += count
    return torch.cat(out)


def digest(library: NativeLibrary, threads: int = 1) -> str:
    """Returns the digest of all logits, drawn tokens and log probabilities, 16 hex digits; takes a tenth of a second."""
    found = hashlib.blake2b(digest_size=8)
    for stored, quantize in WEIGHTS:
        model = _model(stored, quantize)
        for dtype in (torch.float32, torch.bfloat16):
            history: list[int] = [1, 2, 3]
            for position, row in enumerate(_logits(library, model, dtype, threads).numpy(), start=3):
                found.update(row.tobytes())
                for params in DRAWS:
                    drawn = sampler.draw(row, params, position, 1, history)
                    found.update(repr((drawn.token, drawn.logprob, drawn.top)).encode())
                    history.append(drawn.token or 0)
    return found.hexdigest()


@functools.cache
def holds() -> bool:
    """Returns whether this machine computes the golden vectors; without the compiled kernel it does not."""
    library = native()
    if library is None:
        return False
    found = digest(library)
    if found != GOLDEN:
        log.warning(
            "golden vectors differ: exact with machines of this kind alone", expected=GOLDEN, found=found, isa=library.isa.name
        )
    return found == GOLDEN
