"""Finds a model's structure without its weights: whether its layers can be served here, and whether on several nodes.

The model is built on the meta device, which has shapes and no data, and runs over a few rows as a stage runs it. This shows
how its layers call attention, what they return, and their inputs beside the activations: a layer with another input that
depends on the tokens, or on earlier layers, cannot be the first of a stage, which receives activations alone. All of this is
found before a weight is read; whether the values are right is checked by the self-check of a load.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mesh.errors import BadRequest
from node.engine.model import falcon  # noqa: F401 — its import registers its attention
from node.engine.model.attention import NAME, PackedBatch, set_running_batch
from node.engine.model.checkpoint import KNOWN_GOOD, Checkpoint, config_value
from node.engine.model.unservable import Unservable

META = torch.device("meta")
ROWS = 5
MAX_REMEMBERED = 16  # structures that are kept
NO_INTERFACE = "its attention does not go through AttentionInterface"
ALIBI = "its positions are biases of attention scores (ALiBi)"


@dataclass(frozen=True, slots=True)
class Structure:
    """The facts about a model's code that serving depends on.

    `whole_only`: why one node must hold all layers; empty: they may be on several nodes.
    `outputs`: a layer returns a tuple of so many elements, the activations first; 0: the activations alone.
    `kv_elements`: for each layer, how many elements one token's keys and values have. `embedding_width`: of a token's embedding.
    """

    whole_only: str = ""
    outputs: int = 0
    kv_elements: tuple[int, ...] = ()
    embedding_width: int = 0

    def layer_output(self, hidden: torch.Tensor) -> object:
        """Returns `hidden` in the form in which the model's layers return it."""
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden


def activations_in(layer_output: Any) -> torch.Tensor:
    """Returns the activations in a layer's output."""
    taken: torch.Tensor = layer_output[0] if isinstance(layer_output, (tuple, list)) else layer_output
    return taken


def structure_of(checkpoint: Checkpoint) -> Structure:
    """Finds the structure of a checkpoint's model; it is kept for each config.

    Raises:
        BadRequest: its layers cannot be served; with the reason and what would work.
    """
    config: Any = checkpoint.config
    kind: object = type(config)
    try:
        return _structure(checkpoint.model_class, kind, config.to_json_string(use_diff=False), checkpoint.layers)
    except Exception as error:  # whatever the code of some architecture raises
        unknown = not isinstance(error, Unservable) and error.args != (NAME,)
        reason = ALIBI if unknown and _mentions_alibi(checkpoint.model_class) else failure_reason(error)
        raise not_servable(checkpoint, reason) from error


def _mentions_alibi(model_class: type) -> bool:
    return any("alibi" in name for name in vars(sys.modules[model_class.__module__]))


def require_span(checkpoint: Checkpoint, start: int, end: int, ranks: int = 1) -> None:
    """Checks that the layers `[start, end)` can be served by `ranks` ranks.

    Raises:
        BadRequest: they cannot be served by themselves, or not by several ranks.
    """
    whole_only = structure_of(checkpoint).whole_only
    if not whole_only:
        return
    name = checkpoint.directory.name
    if (start, end) != (0, checkpoint.layers):
        raise BadRequest(f"layers {start}:{end} of {name} {whole_only_message(whole_only)}", "layers", "model_not_servable")
    if ranks > 1:
        reason = f"{name} cannot be computed by {ranks} workers, for {whole_only}; leave --tensor-parallel out"
        raise BadRequest(reason, "tensor_parallel", "model_not_servable")


def whole_only_message(reason: str) -> str:
    """Returns the second half of a refusal of some layers: why they are not served, and what would work."""
    return f"cannot be served by themselves, for {reason}; take all layers, with --layers auto"


def not_servable(checkpoint: Checkpoint, reason: str) -> BadRequest:
    return BadRequest(
        f"{checkpoint.directory.name} is {checkpoint.config.model_type}, which cannot be served exactly: {reason}; "
        f"a {KNOWN_GOOD} checkpoint would work",
        param="model",
        code="model_not_servable",
    )


def find_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """Returns the list of decoder layers: the outermost list of the right length. Raises Unservable: there is none."""
    found = [(name.count("."), module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for _, module in sorted(found, key=lambda pair: pair[0]):
        if len(module) == count:
            return module
    raise Unservable(f"there is no list of {count} layers in {type(model).__name__}")


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _structure(model_class: type, config_class: Any, config: str, layers: int) -> Structure:
    """Finds a structure by trial runs. Raises Unservable, or any error of the model's own code."""
    trial = _TrialModel(model_class, config_class.from_dict(json.loads(config)), layers)
    from_tokens = trial.runs(by_tokens=True)
    found = trial.structure() if from_tokens else None
    try:
        from_embeddings = trial.runs(by_tokens=False)
    except Exception as error:
        if found is None or isinstance(error, Unservable):
            raise
        return replace(found, whole_only=found.whole_only or f"its code wants tokens for them ({type(error).__name__})")
    if found is None:
        found = trial.structure() if from_embeddings else trial.known()  # the rest is left to the self-check of a load
    return found


def failure_reason(error: Exception) -> str:
    """Returns the reason for a refusal from an error that a model's own code raised."""
    if isinstance(error, Unservable):
        return str(error)
    if isinstance(error, KeyError) and error.args == (NAME,):
        return NO_INTERFACE  # it looked NAME up in its own table of attention classes
    return f"its own code does not run as a stage runs it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


@dataclass(slots=True)
class _Attention:
    """Stands for stored keys and values (`PagedStep`); counts the calls of attention by layer."""

    calls: Counter[int] = field(default_factory=Counter)
    numbers: dict[int, int] = field(default_factory=dict)  # layer -> elements of a token's keys and values

    def attend(self, layer: int, q: torch.Tensor, kv: torch.Tensor, *more: object) -> torch.Tensor:
        self.calls[layer] += 1
        self.numbers[layer] = kv[0].numel()
        return q.clone()


class _Positions(torch.Tensor):
    """Position numbers that record whether an operation used them; reading their shape or device is no operation."""

    computed_with: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        for each in _tensors([*args, *(kwargs or {}).values()]):
            if isinstance(each, _Positions) and func.__name__ != "__get__":
                each.computed_with = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _TrialModel:
    """A model on the meta device that runs over a few rows.

    Embeddings require a gradient, so every tensor that depends on the tokens does too and can be recognised anywhere.
    """

    def __init__(self, model_class: Any, config: Any, layers: int) -> None:
        self._config = config
        config._attn_implementation = NAME
        with META:
            self._model: Any = model_class(config).eval().requires_grad_(False)
        if self._model._can_set_experts_implementation():
            self._model.set_experts_implementation("batched_mm")  # others select rows by their values
        self._layers = layers
        self._slots = find_layers(getattr(self._model, self._model.base_model_prefix), layers)
        self._width = int(getattr(self._model.get_input_embeddings(), "embedding_dim", 0) or config.hidden_size)
        self._reset()
        for module in self._model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, given, out: out.detach().requires_grad_().clone())
        for number, layer in enumerate(self._slots):
            layer.register_forward_pre_hook(functools.partial(self._before_layer, number), with_kwargs=True)
            layer.register_forward_hook(functools.partial(self._after_layer, number))

    def _reset(self) -> None:
        self._attention = _Attention()
        self._batch = PackedBatch([], 0, self._layers, paged=self._attention)  # type: ignore[arg-type]
        self._runs: Counter[int] = Counter()
        self._outputs: set[int] = set()
        self._biases: set[str] = set()
        self._token_inputs: dict[int, set[str]] = {}  # layer -> arguments that depend on the tokens, or on earlier layers
        self._tail_needs_tokens = False  # whether the code after the layers uses more than the last layer's activations
        self._makes_positions = False  # whether the model computes positions of its own

    def runs(self, *, by_tokens: bool) -> bool:
        """Runs the model from tokens, or else from embeddings; False: its code reads values, which the meta device lacks.

        Raises Unservable, or any error of the model's own code.
        """
        self._reset()
        set_running_batch(self._batch)
        try:
            with META, torch.enable_grad():
                positions = torch.arange(ROWS)[None].as_subclass(_Positions)
                positions.computed_with = False
                embeds = torch.zeros(1, ROWS, self._width, requires_grad=True).clone()
                taken = {"input_ids": torch.zeros(1, ROWS, dtype=torch.long)} if by_tokens else {"inputs_embeds": embeds}
                self._tail_needs_tokens = self._model(**taken, position_ids=positions, use_cache=False).logits.requires_grad
        except RuntimeError as error:
            if "meta" not in str(error).lower():
                raise
            return False
        finally:
            set_running_batch(None)
        names = [name for name, _ in self._model.named_modules() if "position" in name or "rotary" in name]
        self._makes_positions = bool(names) and not positions.computed_with
        return True

    def _before_layer(self, number: int, layer: nn.Module, args: tuple[object, ...], named: dict[str, object]) -> None:
        self._batch.layer = number
        self._runs[number] += 1
        given = _arguments(layer, args, named)
        hidden = given.pop(next(iter(given), ""), None) if args else given.pop("hidden_states", None)
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:2] != (1, ROWS) or hidden.dim() != 3:
            raise Unservable("what goes from layer to layer is not one row of activations a token")
        assert self._slots[number] is layer, "hooks lie on the layers in order"
        self._biases |= {name for name in ("alibi", "position_bias") if given.get(name) is not None}
        made = {name for name, value in given.items() if any(tensor.requires_grad for tensor in _tensors(value))}
        if made and number:
            self._token_inputs[number] = made

    def _after_layer(self, number: int, layer: nn.Module, args: tuple[object, ...], out: object) -> object:
        self._outputs.add(len(out) if isinstance(out, (tuple, list)) else 0)
        if number < self._layers - 1:
            return None
        detached = activations_in(out).detach()  # the activations themselves may go on
        return type(out)([detached, *out[1:]]) if isinstance(out, (tuple, list)) else detached

    def outputs(self) -> int:
        """Returns `Structure.outputs`. Raises Unservable: layers return different numbers of elements."""
        if len(self._outputs) > 1:
            raise Unservable("its layers return different numbers of things")
        return next(iter(self._outputs), 0)

    def structure(self) -> Structure:
        """Returns the structure, after a run that ended. Raises Unservable: the layers cannot be served."""
        if self._biases:
            raise Unservable(ALIBI if "alibi" in self._biases else "its positions are biases of attention scores")
        if self._makes_positions:
            raise Unservable("it numbers the positions of its rows by itself")
        if any(self._runs[number] != 1 for number in range(self._layers)):
            raise Unservable("it does not run each of its layers once")
        calls = {self._attention.calls[number] for number in range(self._layers)}
        if 0 in calls:
            raise Unservable(NO_INTERFACE if calls == {0} else f"{NO_INTERFACE} in some of its layers")
        if calls != {1}:
            raise Unservable("its layers call attention several times, with other keys and values each time")
        whole_only = ""
        if self._token_inputs:
            number, names = next(iter(self._token_inputs.items()))
            whole_only = f"layer {number} is given {', '.join(sorted(names))} beside the activations"
        elif self._tail_needs_tokens:
            whole_only = "what stands behind the layers is given more than their activations"
        return replace(self.known(), whole_only=whole_only)

    def known(self) -> Structure:
        """Returns what is known after any run, even one that did not end. Raises Unservable: the layers cannot be served."""
        return Structure("", self.outputs(), self.kv_elements(), self._width)

    def kv_elements(self) -> tuple[int, ...]:
        """Returns `Structure.kv_elements`; for layers whose attention did not run, from the heads in the config."""
        config = self._config
        heads = int(config_value(config, "num_attention_heads") or 1)
        kv_heads = int(config_value(config, "num_key_value_heads") or heads)
        meant = 2 * kv_heads * int(config_value(config, "head_dim") or config.hidden_size // heads)
        return tuple(self._attention.numbers.get(number, meant) for number in range(self._layers))


def _arguments(layer: nn.Module, args: tuple[object, ...], named: dict[str, object]) -> dict[str, object]:
    """Returns the arguments of a call by name, positional ones first."""
    names = list(inspect.signature(layer.forward).parameters)
    return {name: value for name, value in zip(names, args)} | named


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple, set)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
