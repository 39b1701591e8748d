"""A stage: layers `[start, end)` of any Hugging Face causal language model, run on ragged packed rows.

The model's own class is subclassed at run time: its constructor, which `from_pretrained` runs on the meta device, puts
parameter-free stand-ins in place of the layers of other nodes, so only the span's tensors are ever read, by the ordinary
loader with its weight converters. Layer numbers stay global, for some models choose a layer's kind by its number.

A stage serves any part `[a, b)` of its span. The model's own forward runs in full, so that positions and scalings are the
model's own; each layer slot looks at the running batch: before `a` it returns its input unchanged, at `a` it continues from
the activations received, and the output of `b - 1` is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from node.checkpoints.safetensors_header import weight_files
from node.engine.device import CPU
from node.engine.kv.cache import KVStore, SequenceKV
from node.engine.model.all_reduce import AllReduce
from node.engine.model.attention import NAME, PackedBatch, Segment, set_running_batch
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.compiled_layers import NativeLayers
from node.engine.model.fused_llama import FORMS, FusedLlama
from node.engine.model.linear import BUCKETS, Kernel, PackedLinear, bucket_for
from node.engine.model.mapped import MappedTensors, widen
from node.engine.model.packing import PrunedSpan, SpanPacker
from node.engine.model.progress import LoadTracker
from node.engine.model.structure import Structure, activations_in, failure_reason, find_layers, not_servable, structure_of
from node.engine.model.tensor_shard import Shard

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


class AbsentLayer(nn.Module):
    """Stands for a layer that another node holds: returns its input, in the form that the model's layers return."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self._structure = structure

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        return self._structure.layer_output(hidden_states)


class AbsentEmbedding(nn.Module):
    """Stands for an embedding that is not looked up here."""

    weight = torch.empty(0)  # not a parameter; for models that initialise or inspect their embedding's weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this stage starts behind the embedding, so it takes activations, not tokens")


class AbsentHead(nn.Identity):
    """Stands for a head that another node holds."""

    weight = torch.empty(0)  # as in `AbsentEmbedding`

    def __init__(self, head: object) -> None:
        super().__init__()
        self._bias = (getattr(head, "bias", None),)  # in a tuple, so that it is no parameter of this module

    @property
    def bias(self) -> object:
        """The bias of the head; some models share it with another module."""
        return self._bias[0]


def load_model(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    dtype: torch.dtype,
    tracker: LoadTracker,
    widen_later: bool = False,
    shard: Shard | None = None,
) -> tuple[Any, MappedTensors]:
    """Loads the pruned model with the span's weights, or a shard of them, on the CPU, with the attention of this package.

    `tracker` follows the tensors read. `widen_later`: linear weights that are stored in fewer bits than `dtype` has stay so
    until they are used. The second result maps the files; `release` of it frees the pages of tensors.

    Raises:
        BadRequest: tensors are missing, or the architecture cannot be split into layers.
    """
    cls: Any = checkpoint.model_class
    layers, structure = checkpoint.layers, structure_of(checkpoint)

    def prune(self: Any, config: object, *args: object, **kwargs: object) -> None:
        cls.__init__(self, config, *args, **kwargs)
        slots = find_layers(getattr(self, self.base_model_prefix), layers)
        for number in range(layers):
            if not start <= number < end:
                slots[number] = AbsentLayer(structure)
        if start > 0 and not (end == layers and checkpoint.tied):
            self.set_input_embeddings(AbsentEmbedding())
        if end < layers:
            self.set_output_embeddings(AbsentHead(self.get_output_embeddings()))
        if shard is not None:
            shard.split_modules(self)
        tracker.start_reading({name: tensor.numel() * dtype.itemsize for name, tensor in self.named_parameters()})

    attributes: dict[str, object] = {
        "__init__": prune,
        "__module__": cls.__module__,
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    if end < layers:
        attributes["_tied_weights_keys"] = {}
    pruned: Any = type(cls.__name__, (cls,), attributes)
    try:
        mapped = MappedTensors(weight_files(checkpoint.directory) if shard is None else (), widen_later)
        with tracker:
            model, info = pruned.from_pretrained(
                None,
                state_dict=mapped.tensors if shard is None else shard.tensors(checkpoint.directory),
                config=copy.deepcopy(checkpoint.config),
                dtype=dtype,
                attn_implementation=NAME,
                output_loading_info=True,
                local_files_only=True,
            )
    except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
        raise not_servable(checkpoint, failure_reason(error)) from error
    if info["missing_keys"]:
        raise not_servable(checkpoint, f"the checkpoint lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    mapped.release(parameter.data for parameter in model.parameters())  # mapping a tensor has read the pages at its ends
    widen(model, find_layers(getattr(model, model.base_model_prefix), layers), dtype)
    return model.eval().requires_grad_(False), mapped


class LocalStage:
    """A loaded span that this process computes on the CPU; see `node.engine.model.stage`."""

    device = CPU  # another one in `DeviceStage`
    holds_kv = True
    kv_copies = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        kernel: Kernel,
        threads: int,
        tracker: LoadTracker | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Loads the span's weights. `shard`: this rank's part of the span, where several ranks compute it together.

        Raises:
            BadRequest: as `load_model`.
        """
        self.checkpoint = checkpoint
        self.start, self.end, self.layers = start, end, checkpoint.layers
        self.kernel = kernel
        self.threads = threads
        self.buckets: tuple[int, ...] = BUCKETS
        self._tracker = tracker or LoadTracker(end - start)
        self.shard = shard
        widen_later = shard is None and kernel.compiled and checkpoint.config.model_type in FORMS
        self.model, self._mapped = load_model(checkpoint, start, end, kernel.dtype, self._tracker, widen_later, shard)
        self.parameters = sum(tensor.numel() for tensor in self.model.parameters())
        self._structure = structure_of(checkpoint)
        self._base = getattr(self.model, self.model.base_model_prefix)
        self._slots = find_layers(self._base, self.layers)
        self._layer_products: list[PackedLinear] = []
        self.fused: FusedLlama | NativeLayers | None = None
        self.windows: set[int] = set()
        self.has_unpacked_weights = False
        self._store = KVStore()
        self._running: PackedBatch | None = None
        self._on_layer_done: Callable[[int], None] | None = None
        for number in range(start, end):
            layer = self._slots[number]
            layer.forward = self._slot(number, layer.forward)

    def _slot(self, number: int, run: Callable[..., object]) -> Callable[..., object]:
        def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
            batch = self._running
            if batch is None or not batch.start <= number < batch.end:
                return self._structure.layer_output(hidden_states)
            batch.layer = number
            activations = batch.hidden if number == batch.start and batch.hidden is not None else hidden_states
            out = run(activations, *args, **kwargs)
            if number == batch.end - 1:
                batch.captured = activations_in(out)
            if self._on_layer_done is not None:
                self._on_layer_done(number)
            return out

        return forward

    def sequence(self) -> SequenceKV:
        """Returns the keys and values of a new sequence, empty."""
        return SequenceKV(self._store)

    @torch.inference_mode()
    def forward(
        self,
        start: int,
        end: int,
        segments: list[Segment],
        positions: Sequence[int],
        *,
        ids: Sequence[int] | None = None,
        hidden: torch.Tensor | None = None,
        logits_at: Sequence[int] = (),
    ) -> torch.Tensor:
        """As `Stage.forward`."""
        rows = len(positions)
        assert self.start <= start < end <= self.end, "the layers lie within the span"
        assert (ids is None) != (hidden is None), "either tokens or activations"
        # Rows are padded to a bucket: only row counts that give every row the same bits are computed with.
        bucket = bucket_for(rows, self.buckets)
        position_ids = torch.tensor([*positions, *[0] * (bucket - rows)])
        tokens = None if ids is None else torch.tensor([*ids, *[0] * (bucket - rows)])
        activations = None
        if hidden is not None:
            hidden = hidden.to(self.kernel.dtype)
            activations = F.pad(hidden, (0, 0, 0, bucket - rows)) if bucket > rows else hidden
        logit_rows = None
        if end == self.layers and logits_at:
            padding = bucket_for(len(logits_at), self.buckets) - len(logits_at)
            logit_rows = torch.tensor([*logits_at, *[logits_at[-1]] * padding])
        batch = PackedBatch(segments, start, end, None if activations is None else activations[None])
        all_rows = logit_rows is not None and bucket == len(logit_rows) and rows == len(logits_at)
        out = self._compute(batch, position_ids, tokens, activations, logit_rows, all_rows)
        return out[:rows] if logit_rows is None else out[: len(logits_at)]

    def _compute(
        self,
        batch: PackedBatch,
        position_ids: torch.Tensor,
        tokens: torch.Tensor | None,
        activations: torch.Tensor | None,
        logit_rows: torch.Tensor | None,
        all_rows: bool,
    ) -> torch.Tensor:
        """Computes `forward` over rows that fill a bucket, `activations` or else `tokens`; the result has rows of padding too.

        `all_rows`: `logit_rows` are all rows, in order.
        """
        if self.fused is None:
            return self._run_model(batch, position_ids, tokens, logit_rows)
        entering = activations
        if entering is None:
            assert tokens is not None
            entering = self.fused.embed(tokens)
        out = self.fused.run(batch, entering, position_ids)
        self.windows |= self.fused.windows
        return out if logit_rows is None else self.fused.logits(out if all_rows else out[logit_rows])

    def _run_model(
        self, batch: PackedBatch, position_ids: torch.Tensor, tokens: torch.Tensor | None, logit_rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Computes `_compute` with the model's own code."""
        inputs: dict[str, object] = {"position_ids": position_ids[None], "use_cache": False}
        if batch.hidden is not None:
            inputs["inputs_embeds"] = self._placeholder_embeddings(batch.hidden)
        else:
            assert tokens is not None
            inputs["input_ids"] = tokens[None]
        self._running = batch
        set_running_batch(batch)
        try:
            if logit_rows is not None:
                logits: torch.Tensor = self.model(**inputs, logits_to_keep=logit_rows).logits[0]
                return logits.float()
            self._base(**inputs)
            assert batch.captured is not None
            return batch.captured[0]
        finally:
            self.windows |= batch.windows
            self._running = None
            set_running_batch(None)

    def _placeholder_embeddings(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns zeros for the embeddings of rows whose activations `hidden` `[1, rows, hidden]` enter at a later layer."""
        return hidden.new_zeros(1, hidden.shape[1], self._structure.embedding_width)

    @torch.inference_mode()
    def reference(
        self, ids: Sequence[int] | None, hidden: torch.Tensor | None, on_layer_done: Callable[[int], None] = lambda number: None
    ) -> torch.Tensor:
        """Computes the whole span over one sequence with transformers' own attention and masks, for the self-check.

        Returns what `forward` should: activations `[rows, hidden_size]`, or logits `[rows, vocab]`. Only before `pack`.
        `on_layer_done` is called with the number of each layer after it has run.
        """
        inputs: dict[str, object] = {"use_cache": False}  # no positions: the model makes those that `forward` must match
        activations = None if hidden is None else hidden.to(self.device, self.kernel.dtype)[None]
        if ids is not None:
            inputs["input_ids"] = torch.tensor([list(ids)], device=self.device)
        else:
            assert activations is not None
            inputs["inputs_embeds"] = self._placeholder_embeddings(activations)
        batch = PackedBatch([], self.start, self.end, activations)
        self._running = batch
        self._on_layer_done = on_layer_done
        self._set_attention("eager")
        try:
            if self.end == self.layers:
                logits: torch.Tensor = self.model(**inputs).logits[0].float().cpu()
                return logits
            self._base(**inputs)
            assert batch.captured is not None
            return batch.captured[0].cpu()
        finally:
            self._running = None
            self._on_layer_done = None
            self._set_attention(NAME)

    def _set_attention(self, name: str) -> None:
        self.model.set_attn_implementation(name)
        self.model.config._attn_implementation = name  # read by modules that choose their attention class by themselves

    def pack(self) -> None:
        """Replaces every linear layer by its packed form and finds the row buckets on which all of them agree.

        Raises:
            ValueError: this kernel cannot hold the weights, or no two row counts agree.
        """
        packer = self._packer()
        for number in range(self.start, self.end):
            packer.layer(number)
        self._finish(packer)

    def pack_with_reference(self, ids: Sequence[int] | None, hidden: torch.Tensor | None) -> torch.Tensor:
        """Returns `reference` and packs each layer as soon as it has run: only one layer at a time is held in both forms.

        Raises:
            ValueError: as `pack`.
        """
        packer = self._packer()
        expected = self.reference(ids, hidden, packer.layer)
        self._finish(packer)
        return expected

    def _packer(self) -> SpanPacker:
        self._tracker.start_packing()
        span = PrunedSpan(self.model, self._base, self._slots, self.start, self.end)
        release, on_packed = self._mapped.release, self._tracker.layer_packed
        return SpanPacker(span, self.checkpoint, self.kernel, self.threads, release, on_packed, whole=self.shard is None)

    def join(self, all_reduce: AllReduce, buckets: tuple[int, ...]) -> None:
        """Connects a packed shard with the other ranks: sums over them, and uses the `buckets` that all of them share."""
        assert self.shard is not None
        assert set(buckets) <= set(self.buckets), "this rank agrees on them too"
        self.buckets = buckets
        for packed in self._layer_products:
            packed.buckets = buckets
        self.shard.join(self.model, all_reduce)

    @property
    def constants_digest(self) -> str:
        return "" if self.fused is None else self.fused.constants_digest

    def on_end(self, call: Callable[[str], None]) -> None:
        """Does nothing: a local stage ends only with its process."""

    def close(self) -> None:
        """Does nothing: the weights are freed with the object."""

    def _finish(self, packer: SpanPacker) -> None:
        packed = packer.finish()
        self.buckets, self.fused, self.has_unpacked_weights = packed.buckets, packed.fused, packed.has_unpacked_weights
        self._layer_products = packed.layer_products
        if self.start > 0 and not isinstance(self.model.get_input_embeddings(), AbsentEmbedding):
            self.model.set_input_embeddings(AbsentEmbedding())  # it was loaded for a tied head, which is packed now
        self._mapped.close()
