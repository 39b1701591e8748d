"""The layers of Llama-shaped models, compiled: one call for all layers of a step.

Attention reads and writes the sequences' keys and values where they lie (node.engine.kv.cache). Norms, products, rotary
positions, attention, activation and residual sums keep to one order of operations for each row, whatever stands beside
it: rows need no padding here. What lies between the rounding of a layer's input and that of its sums stays float32 but
for queries, keys, values and weights of attention, so these layers round less than the model's own; the self-check
holds them against it.
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
from node.engine.model.mapped import LetGo
from node.engine.native.library import LayerParts, NativeLibrary, SpanParts, native
from node.engine.native.portable import PortableMath
from node.engine.native.product import NativeProduct

Join = Callable[[list[torch.Tensor]], Any]
"""Weights `[outputs, inputs]`, or biases, of layers that are given the same rows, as one."""

HALF_PANEL = 16
FIRST_POSITIONS = 1024  # of the table of rotary positions, which doubles when a position lies beyond it


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer. `kept` holds what `parts` points to."""

    parts: LayerParts
    kept: tuple[Any, ...]


class KvSpans:
    """Where the keys and values of a step's sequences lie, in all of its layers."""

    def __init__(self, batch: PackedBatch, like: torch.Tensor) -> None:
        """`like`: `[…, 2, kv_heads, dim]`, of the rows' dtype."""
        layers = range(batch.start, batch.end)
        segments = batch.segments
        places = [segment.kv.addresses(layers, segment.position + segment.count, like) for segment in segments]
        self._told = torch.tensor(
            [
                [segment.row for segment in segments],
                [segment.count for segment in segments],
                [segment.position for segment in segments],
                [capacity * like.shape[3] for _, capacity in places],
            ]
        )
        self._addresses = torch.stack([addresses for addresses, _ in places], 2)  # [2, layers, spans]
        told = (self._told[number].data_ptr() for number in range(4))
        self.parts = SpanParts(len(segments), *told, *(side.data_ptr() for side in self._addresses))


class NativeLayers:
    """A Llama-shaped model's layers `[start, end)`, and what stands around them: the interface of `lean.Lean`."""

    def __init__(self, base: Any, head: NativeProduct | None, layers: dict[int, NativeLayer], dtype: torch.dtype) -> None:
        library = native()
        assert library is not None
        self._library: NativeLibrary = library
        self._base = base
        with PortableMath():  # the model's own has torch's powers, which differ by machine
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
        self._turns = self._turn_table(FIRST_POSITIONS)

    @property
    def constants(self) -> str:
        """A digest of what was derived from the config and decides bits: the same for every span of a model."""
        parts = (layer.parts for layer in self._layers.values())
        scalars = sorted({(each.eps, each.head_eps, each.scale) for each in parts})
        derived = repr((scalars, float(self._rotary.attention_scaling), self._eps)).encode()
        return hashlib.blake2b(derived + self._rotary.inv_freq.numpy().tobytes(), digest_size=8).hexdigest()

    def _turn_table(self, positions: int) -> torch.Tensor:
        """`[positions, 2, dim / 2]` float32: cosines, then sines."""
        like = torch.zeros(1, dtype=torch.float32)
        with PortableMath():
            cos, sin = self._rotary(like, torch.arange(positions)[None])
        half = cos.shape[-1] // 2
        return torch.stack((cos[0, :, :half], sin[0, :, :half]), 1).contiguous()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """`[rows] -> [rows, hidden]`."""
        out: torch.Tensor = self._base.embed_tokens(ids)
        return out

    def run(self, batch: PackedBatch, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The batch's layers over `x` `[rows, hidden]`."""
        while len(self._turns) <= int(positions.max()):
            self._turns = self._turn_table(2 * len(self._turns))
        x = x.clone(memory_format=torch.contiguous_format)
        shape = self._layers[batch.start].parts
        spans = KvSpans(batch, x.new_empty(0, 2, shape.kv_heads, shape.dim))
        self._library.layers(
            ctypes.byref(self._addresses, (batch.start - self._first) * ctypes.sizeof(ctypes.c_void_p)),
            batch.end - batch.start,
            x.data_ptr(),
            positions.data_ptr(),
            self._turns.data_ptr(),
            x.shape[0],
            self._dtype is torch.bfloat16,
            ctypes.byref(spans.parts),
            torch.get_num_threads(),
        )
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden] -> [rows, vocab]` in float32."""
        assert self._head is not None
        x = x.contiguous()
        out = torch.empty(x.shape[0], self._head.outputs)
        parts, bf16 = ctypes.byref(self._head.parts), self._dtype is torch.bfloat16
        threads = torch.get_num_threads()
        self._library.logits(parts, self._norm.data_ptr(), self._eps, x.data_ptr(), x.shape[0], bf16, out.data_ptr(), threads)
        return out


def fits(model: Any, base: Any, slots: nn.ModuleList, start: int, end: int) -> bool:
    """Whether the model's layers `[start, end)`, its last norm and its head have the form that is compiled."""
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
    """The packed `layers` of a model that `fits`, with its head, whose own weights are freed if nothing else has them."""
    head = None
    own = model.get_output_embeddings()
    if isinstance(own, nn.Linear):
        head = NativeProduct(own.weight.data, None if own.bias is None else own.bias.data, kernel.quantize)
        model.set_output_embeddings(nn.Identity())
    return NativeLayers(base, head, layers, kernel.dtype)


def _take(parent: object, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear layer's weight and bias; the layer is gone afterwards."""
    layer = getattr(parent, name)
    setattr(parent, name, nn.Identity())
    return layer.weight.data, None if layer.bias is None else layer.bias.data


def _packed(parent: object, names: tuple[str, ...], join: Join, quantize: str, let_go: LetGo) -> NativeProduct:
    taken = [_take(parent, name) for name in names]
    weights, biases = [weight for weight, _ in taken], [bias for _, bias in taken]
    bias = None
    if any(each is not None for each in biases):
        bias = join([weight.new_zeros(len(weight)) if own is None else own for weight, own in taken])
    product = NativeProduct(join(weights), bias, quantize)
    let_go(weights)
    return product


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Interleaved:
    """Rows of two matrices in turns of 16, the first's first; both filled up with zeros to whole turns. Made where it is read."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self._parts = parts
        count, *row = parts[0].shape
        self.shape = (-(-count // HALF_PANEL) * HALF_PANEL * len(parts), *row)
        self.dtype = parts[0].dtype

    def __getitem__(self, outputs: slice) -> torch.Tensor:
        """`outputs` begins and ends with whole turns."""
        turn = HALF_PANEL * len(self._parts)
        first, end = outputs.start // turn * HALF_PANEL, outputs.stop // turn * HALF_PANEL
        sides = [part[first:end] for part in self._parts]
        filled = [torch.cat((side, side.new_zeros(end - first - len(side), *side.shape[1:]))) for side in sides]
        return torch.stack([side.view(-1, HALF_PANEL, *side.shape[1:]) for side in filled], 1).flatten(0, 2)


def _interleaved(parts: list[torch.Tensor]) -> torch.Tensor | Interleaved:
    """Biases at once, weights as they are packed: they may be large."""
    whole = Interleaved(parts)
    return whole if parts[0].dim() > 1 else whole[0 : whole.shape[0]]


def native_layer(layer: Any, config: Any, quantize: str, let_go: LetGo) -> NativeLayer:
    """Packs one layer; `let_go` is called with each product's own weights once they are."""
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
    middle = mlp.gate_proj.out_features
    qkv = _packed(attention, ("q_proj", "k_proj", "v_proj"), _joined, quantize, let_go)
    out = _packed(attention, ("o_proj",), _joined, quantize, let_go)
    gate_up = _packed(mlp, ("gate_proj", "up_proj"), _interleaved, quantize, let_go)
    down = _packed(mlp, ("down_proj",), _joined, quantize, let_go)
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
        middle,
        getattr(config if config.model_type == "mistral" else attention, "sliding_window", None) or 0,
    )
    return NativeLayer(parts, (norms, qkv, out, gate_up, down))
