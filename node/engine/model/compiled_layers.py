"""The layers of Llama-shaped models, computed by the compiled kernel: one call for all layers of a step.

Attention reads and writes the sequences' keys and values in place (node.engine.kv.cache). Norms, products, rotary
embedding, attention, activation and residual sums have one order of operations for each row, whatever the batch, so rows
need no padding here. Intermediate values stay float32, except queries, keys, values and attention weights, so these layers
round less than the model's own; the self-check compares both.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from node.engine.model.attention import PackedBatch
from node.engine.model.linear import Kernel
from node.engine.model.mapped import ReleaseMemory
from node.engine.native.library import LayerParts, NativeLibrary, SpanParts, native
from node.engine.native.portable import PortableMath
from node.engine.native.product import NativeProduct

Join = Callable[[list[torch.Tensor]], Any]
"""Combines the weights `[outputs, inputs]`, or biases, of layers with the same input rows."""

HALF_PANEL = 16
INITIAL_POSITIONS = 1024  # of the rotary table, which doubles when a position lies beyond it


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer. `kept` holds references to the memory to which `parts` points."""

    parts: LayerParts
    kept: tuple[Any, ...]


class KvSpans:
    """The addresses of the keys and values of a step's sequences, in all layers of the step."""

    def __init__(self, batch: PackedBatch, like: torch.Tensor) -> None:
        """Collects the addresses. `like` `[…, 2, kv_heads, dim]` has the dtype of the rows."""
        layers = range(batch.start, batch.end)
        segments = batch.segments
        assert layers, "a step computes at least one layer"
        places = [segment.kv.addresses(layers, segment.position + segment.count, like) for segment in segments]
        self._columns = torch.tensor(
            [
                [segment.row for segment in segments],
                [segment.count for segment in segments],
                [segment.position for segment in segments],
                [capacity * like.shape[3] for _, capacity in places],
            ]
        )
        self._addresses = torch.stack([addresses for addresses, _ in places], 2)  # [2, layers, spans]
        columns = (self._columns[number].data_ptr() for number in range(4))
        self.parts = SpanParts(len(segments), *columns, *(side.data_ptr() for side in self._addresses))


class NativeLayers:
    """A Llama-shaped model's layers `[start, end)` with its embedding, last norm and head; the interface of `FusedLlama`."""

    def __init__(self, base: Any, head: NativeProduct | None, layers: dict[int, NativeLayer], dtype: torch.dtype) -> None:
        library = native()
        assert library is not None
        self._library: NativeLibrary = library
        self._base = base
        with PortableMath():  # the model's own frequencies come from torch's `pow`, which differs by machine
            self._rotary = type(base.rotary_emb)(config=base.rotary_emb.config)
        self._head = head
        self._layers = layers
        self._first = min(layers)
        self.windows = frozenset(layer.parts.window for layer in layers.values())
        ordered = [ctypes.addressof(layers[number].parts) for number in sorted(layers)]
        self._addresses = (ctypes.c_void_p * len(ordered))(*ordered)
        self._norm = base.norm.weight.detach().float().contiguous()
        self._eps = float(base.norm.variance_epsilon)
        self._dtype = dtype
        self._rotary_table = self._make_rotary_table(INITIAL_POSITIONS)

    @property
    def constants_digest(self) -> str:
        """A digest of the values that were derived from the config and decide bits: the same for every span of a model."""
        parts = (layer.parts for layer in self._layers.values())
        scalars = sorted({(each.eps, each.head_eps, each.scale) for each in parts})
        derived = repr((scalars, float(self._rotary.attention_scaling), self._eps)).encode()
        return hashlib.blake2b(derived + self._rotary.inv_freq.numpy().tobytes(), digest_size=8).hexdigest()

    def _make_rotary_table(self, positions: int) -> torch.Tensor:
        """Returns cosines and sines of the rotary embedding, `[positions, 2, dim / 2]` float32."""
        like = torch.zeros(1, dtype=torch.float32)
        with PortableMath():
            cos, sin = self._rotary(like, torch.arange(positions)[None])
        half = cos.shape[-1] // 2
        return torch.stack((cos[0, :, :half], sin[0, :, :half]), 1).contiguous()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Looks tokens up: `[rows] -> [rows, hidden]`."""
        out: torch.Tensor = self._base.embed_tokens(ids)
        return out

    def run(self, batch: PackedBatch, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Computes the batch's layers over `x` `[rows, hidden]` at `positions` `[rows]`; returns a new tensor."""
        assert x.shape[0] == positions.shape[0], "one position a row"
        while len(self._rotary_table) <= int(positions.max()):
            self._rotary_table = self._make_rotary_table(2 * len(self._rotary_table))
        x = x.clone(memory_format=torch.contiguous_format)
        shape = self._layers[batch.start].parts
        spans = KvSpans(batch, x.new_empty(0, 2, shape.kv_heads, shape.dim))
        self._library.layers(
            ctypes.byref(self._addresses, (batch.start - self._first) * ctypes.sizeof(ctypes.c_void_p)),
            batch.end - batch.start,
            x.data_ptr(),
            positions.data_ptr(),
            self._rotary_table.data_ptr(),
            x.shape[0],
            self._dtype is torch.bfloat16,
            ctypes.byref(spans.parts),
            torch.get_num_threads(),
        )
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the last norm and the head: `[rows, hidden] -> [rows, vocab]` in float32."""
        assert self._head is not None
        x = x.contiguous()
        out = torch.empty(x.shape[0], self._head.outputs)
        parts, bf16 = ctypes.byref(self._head.parts), self._dtype is torch.bfloat16
        threads = torch.get_num_threads()
        self._library.logits(parts, self._norm.data_ptr(), self._eps, x.data_ptr(), x.shape[0], bf16, out.data_ptr(), threads)
        return out


def has_compiled_form(model: Any, base: Any, slots: nn.ModuleList, start: int, end: int) -> bool:
    """Returns whether the layers `[start, end)`, the last norm and the head have the form that the compiled kernel computes."""
    head = model.get_output_embeddings() if end == len(slots) else None
    if head is not None and not isinstance(head, nn.Linear):
        return False
    if model.config.hidden_act not in ("silu", "swish") or not hasattr(getattr(base, "rotary_emb", None), "config"):
        return False
    norms = [base.norm]
    for layer in slots[start:end]:
        attention: Any = layer.self_attn
        mlp = layer.mlp
        linear = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        linear += [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        of_heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        if not all(isinstance(each, nn.Linear) for each in linear) or (of_heads[0] is None) != (of_heads[1] is None):
            return False
        if attention.head_dim % 2 or base.rotary_emb.inv_freq.shape[0] * 2 != attention.head_dim:
            return False
        norms += [layer.input_layernorm, layer.post_attention_layernorm, *(norm for norm in of_heads if norm is not None)]
    return all(hasattr(norm, "variance_epsilon") for norm in norms)


def native_layers(model: Any, base: object, layers: dict[int, NativeLayer], kernel: Kernel) -> NativeLayers:
    """Returns the packed `layers` of a model that `has_compiled_form`, with its head packed.

    The head's own weights are freed, unless the embedding shares them.
    """
    head = None
    own = model.get_output_embeddings()
    if isinstance(own, nn.Linear):
        head = NativeProduct(own.weight.data, None if own.bias is None else own.bias.data, kernel.quantize)
        model.set_output_embeddings(nn.Identity())
    return NativeLayers(base, head, layers, kernel.dtype)


def _take(parent: object, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Removes a linear layer from `parent`; returns its weight and bias."""
    layer = getattr(parent, name)
    setattr(parent, name, nn.Identity())
    return layer.weight.data, None if layer.bias is None else layer.bias.data


def _packed(parent: object, names: tuple[str, ...], join: Join, quantize: str, release: ReleaseMemory) -> NativeProduct:
    taken = [_take(parent, name) for name in names]
    weights, biases = [weight for weight, _ in taken], [bias for _, bias in taken]
    bias = None
    if any(each is not None for each in biases):
        bias = join([weight.new_zeros(len(weight)) if own is None else own for weight, own in taken])
    product = NativeProduct(join(weights), bias, quantize)
    release(weights)
    return product


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Interleaved:
    """Rows of several matrices interleaved in blocks of 16, each padded with zeros to whole blocks; computed where it is read."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self._parts = parts
        count, *row = parts[0].shape
        self.shape = (-(-count // HALF_PANEL) * HALF_PANEL * len(parts), *row)
        self.dtype = parts[0].dtype

    def __getitem__(self, outputs: slice) -> torch.Tensor:
        """Returns the rows `outputs`, which begins and ends at multiples of 16 rows of every matrix."""
        block = HALF_PANEL * len(self._parts)
        first, end = outputs.start // block * HALF_PANEL, outputs.stop // block * HALF_PANEL
        sides = [part[first:end] for part in self._parts]
        filled = [torch.cat((side, side.new_zeros(end - first - len(side), *side.shape[1:]))) for side in sides]
        return torch.stack([side.view(-1, HALF_PANEL, *side.shape[1:]) for side in filled], 1).flatten(0, 2)


def _interleaved(parts: list[torch.Tensor]) -> torch.Tensor | Interleaved:
    """Interleaves biases at once, and weights, which may be large, piece by piece as they are packed."""
    whole = Interleaved(parts)
    return whole if parts[0].dim() > 1 else whole[0 : whole.shape[0]]


def native_layer(layer: Any, config: Any, quantize: str, release: ReleaseMemory) -> NativeLayer:
    """Packs one layer; `release` is called with the weights of each product once they are packed."""
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
    intermediate = mlp.gate_proj.out_features
    qkv = _packed(attention, ("q_proj", "k_proj", "v_proj"), _joined, quantize, release)
    out = _packed(attention, ("o_proj",), _joined, quantize, release)
    gate_up = _packed(mlp, ("gate_proj", "up_proj"), _interleaved, quantize, release)
    down = _packed(mlp, ("down_proj",), _joined, quantize, release)
    modules = (layer.input_layernorm, getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    norms = [None if norm is None else norm.weight.detach().float() for norm in (*modules, layer.post_attention_layernorm)]
    eps = float(layer.input_layernorm.variance_epsilon)
    head_eps = float(attention.q_norm.variance_epsilon) if norms[1] is not None else eps
    parts = LayerParts(
        *(None if norm is None else norm.data_ptr() for norm in norms),
        *(product.parts for product in (qkv, out, gate_up, down)),
        eps,
        head_eps,
        float(attention.scaling),
        layer.input_layernorm.weight.shape[0],
        heads,
        kv_heads,
        dim,
        intermediate,
        getattr(config if config.model_type == "mistral" else attention, "sliding_window", None) or 0,
    )
    return NativeLayer(parts, (norms, qkv, out, gate_up, down))
