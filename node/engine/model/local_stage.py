"""A stage: layers `[start, end)` of any Hugging Face causal language model, run on ragged packed rows.

The model's own class is subclassed at run time: its constructor, which `from_pretrained` runs on the meta device, puts
parameter-free stand-ins in place of the layers of other nodes, so only the span's tensors are ever read, by the ordinary
loader with its weight converters. Layer numbers stay global, for some models choose a layer's kind by its number.

A stage serves any part `[a, b)` of its span. The model's own forward runs in full, which computes positions and scalings
as the model wants them; each layer slot looks at the running batch: before `a` it hands on what came, at `a` it takes
up the activations received, and what comes out of `b - 1` is kept.
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
from node.engine.model.attention import NAME, PackedBatch, Segment, set_batch
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.compiled_layers import NativeLayers
from node.engine.model.fused_llama import FORMS, FusedLlama
from node.engine.model.linear import BUCKETS, Kernel, PackedLinear, bucket_for
from node.engine.model.mapped import MappedTensors, widen
from node.engine.model.packing import PrunedSpan, SpanPacker
from node.engine.model.progress import LoadTracker
from node.engine.model.structure import Structure, activations_in, cannot_serve, find_layers, structure_of, why_it_failed
from node.engine.model.tensor_shard import Shard

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


class AbsentLayer(nn.Module):
    """Stands for a layer that another node holds: returns what it is given, in the form that the model's layers return."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self._structure = structure

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        return self._structure.layer_output(hidden_states)


class AbsentEmbedding(nn.Module):
    """Stands for an embedding that is not looked up here."""

    weight = torch.empty(0)  # no parameter: models that initialise or inspect their embedding find something there

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this stage starts behind the embedding, so it takes activations, not tokens")


class AbsentHead(nn.Identity):
    """Stands for a head that another node holds."""

    weight = torch.empty(0)  # as of `AbsentEmbedding`

    def __init__(self, head: object) -> None:
        super().__init__()
        self._bias_of = (getattr(head, "bias", None),)  # a tuple: no parameter of this module

    @property
    def bias(self) -> object:
        """The head's own: some models make it a parameter of another module too."""
        return self._bias_of[0]


def load_model(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    dtype: torch.dtype,
    watch: LoadTracker,
    late: bool = False,
    shard: Shard | None = None,
) -> tuple[Any, MappedTensors]:
    """The pruned model with the span's weights, or a shard of them, on this CPU, ready for our attention. `watch` sees them come.

    `late`: linear weights that are stored in fewer bits than `dtype` has are left so until they are used.

    Raises:
        BadRequest: tensors are missing, or the architecture cannot be taken apart.
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
            shard.narrow(self)
        watch.begins({name: tensor.numel() * dtype.itemsize for name, tensor in self.named_parameters()})

    body: dict[str, object] = {"__init__": prune, "__module__": cls.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]}
    if end < layers:
        body["_tied_weights_keys"] = {}
    pruned: Any = type(cls.__name__, (cls,), body)
    try:
        mapped = MappedTensors(weight_files(checkpoint.directory) if shard is None else (), late)
        with watch:
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
        raise cannot_serve(checkpoint, why_it_failed(error)) from error
    if info["missing_keys"]:
        raise cannot_serve(checkpoint, f"the checkpoint lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    mapped.let_go(parameter.data for parameter in model.parameters())  # to map a tensor reads what lies about its ends
    widen(model, find_layers(getattr(model, model.base_model_prefix), layers), dtype)
    return model.eval().requires_grad_(False), mapped


class LocalStage:
    """A loaded span that this process computes on the CPU; see `node.engine.model.stage`."""

    device = CPU  # `DeviceStage` serves others
    holds_kv = True
    kv_copies = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        kernel: Kernel,
        threads: int,
        watch: LoadTracker | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Raises BadRequest, as `load_model`. `shard`: of the span, which several ranks compute together."""
        self.checkpoint = checkpoint
        self.start, self.end, self.layers = start, end, checkpoint.layers
        self.kernel = kernel
        self.threads = threads
        self.buckets: tuple[int, ...] = BUCKETS
        self._watch = watch or LoadTracker(end - start)
        self.shard = shard
        late = shard is None and kernel.compiled and checkpoint.config.model_type in FORMS
        self.model, self._mapped = load_model(checkpoint, start, end, kernel.dtype, self._watch, late, shard)
        self.parameters = sum(tensor.numel() for tensor in self.model.parameters())
        self._structure = structure_of(checkpoint)
        self._base = getattr(self.model, self.model.base_model_prefix)
        self._slots = find_layers(self._base, self.layers)
        self._inner: list[PackedLinear] = []
        self.fused: FusedLlama | NativeLayers | None = None
        self.windows: set[int] = set()  # that attention was asked to look through so far; 0: everything
        self.loose = False  # there are weights that are not packed, whose products promise nothing
        self._store = KVStore()
        self._running: PackedBatch | None = None
        self._ran: Callable[[int], None] | None = None
        for number in range(start, end):
            layer = self._slots[number]
            layer.forward = self._slot(number, layer.forward)

    def _slot(self, number: int, run: Callable[..., object]) -> Callable[..., object]:
        def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
            batch = self._running
            if batch is None or not batch.start <= number < batch.end:
                return self._structure.layer_output(hidden_states)
            batch.layer = number
            taken = batch.hidden if number == batch.start and batch.hidden is not None else hidden_states
            out = run(taken, *args, **kwargs)
            if number == batch.end - 1:
                batch.captured = activations_in(out)
            if self._ran is not None:
                self._ran(number)
            return out

        return forward

    def sequence(self) -> SequenceKV:
        """Keys and values of a new sequence."""
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
        """Runs layers `[start, end)` over packed rows, `ids` (if `start` is 0) or `hidden` `[rows, hidden_size]`.

        Returns the activations `[rows, hidden_size]` in the model's dtype, or behind the last layer the float32 logits
        `[len(logits_at), vocab]` of those rows alone. The segments' keys and values are written on the way.
        """
        rows = len(positions)
        bucket = bucket_for(rows, self.buckets)
        where = torch.tensor([*positions, *[0] * (bucket - rows)])
        tokens = None if ids is None else torch.tensor([*ids, *[0] * (bucket - rows)])
        taken = None
        if hidden is not None:
            hidden = hidden.to(self.kernel.dtype)
            taken = F.pad(hidden, (0, 0, 0, bucket - rows)) if bucket > rows else hidden
        wanted = None
        if end == self.layers and logits_at:
            short = bucket_for(len(logits_at), self.buckets) - len(logits_at)
            wanted = torch.tensor([*logits_at, *[logits_at[-1]] * short])
        batch = PackedBatch(segments, start, end, None if taken is None else taken[None])
        every = wanted is not None and bucket == len(wanted) and rows == len(logits_at)
        out = self._compute(batch, where, tokens, taken, wanted, every)
        return out[:rows] if wanted is None else out[: len(logits_at)]

    def _compute(
        self,
        batch: PackedBatch,
        where: torch.Tensor,
        tokens: torch.Tensor | None,
        taken: torch.Tensor | None,
        wanted: torch.Tensor | None,
        every: bool,
    ) -> torch.Tensor:
        """`forward` over rows that fill a bucket, `taken` or else `tokens`; padding comes out too. `every`: all are `wanted`."""
        if self.fused is None:
            return self._through_the_model(batch, where, tokens, wanted)
        entering = taken
        if entering is None:
            assert tokens is not None
            entering = self.fused.embed(tokens)
        out = self.fused.run(batch, entering, where)
        self.windows |= self.fused.windows
        return out if wanted is None else self.fused.logits(out if every else out[wanted])

    def _through_the_model(
        self, batch: PackedBatch, where: torch.Tensor, tokens: torch.Tensor | None, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        """`_compute` by the model's own code."""
        inputs: dict[str, object] = {"position_ids": where[None], "use_cache": False}
        if batch.hidden is not None:
            inputs["inputs_embeds"] = self._no_embeddings(batch.hidden)
        else:
            assert tokens is not None
            inputs["input_ids"] = tokens[None]
        self._running = batch
        set_batch(batch)
        try:
            if wanted is not None:
                logits: torch.Tensor = self.model(**inputs, logits_to_keep=wanted).logits[0]
                return logits.float()
            self._base(**inputs)
            assert batch.captured is not None
            return batch.captured[0]
        finally:
            self.windows |= batch.windows
            self._running = None
            set_batch(None)

    def _no_embeddings(self, hidden: torch.Tensor) -> torch.Tensor:
        """What stands for the embeddings of rows whose activations `hidden` `[1, rows, hidden]` enter at a later layer."""
        return hidden.new_zeros(1, hidden.shape[1], self._structure.embedding_width)

    @torch.inference_mode()
    def plain(
        self, ids: Sequence[int] | None, hidden: torch.Tensor | None, ran: Callable[[int], None] = lambda number: None
    ) -> torch.Tensor:
        """The whole span over one sequence with transformers' own attention and masks: the oracle of the self-check.

        Returns what `forward` would: activations `[rows, hidden_size]`, or logits `[rows, vocab]`. Only before `pack`.
        `ran` is told of each layer that is done.
        """
        inputs: dict[str, object] = {"use_cache": False}  # and no positions: the model's own are those that ours must equal
        taken = None if hidden is None else hidden.to(self.device, self.kernel.dtype)[None]
        if ids is not None:
            inputs["input_ids"] = torch.tensor([list(ids)], device=self.device)
        else:
            assert taken is not None
            inputs["inputs_embeds"] = self._no_embeddings(taken)
        batch = PackedBatch([], self.start, self.end, taken)
        self._running = batch
        self._ran = ran
        self._attend_by("eager")
        try:
            if self.end == self.layers:
                logits: torch.Tensor = self.model(**inputs).logits[0].float().cpu()
                return logits
            self._base(**inputs)
            assert batch.captured is not None
            return batch.captured[0].cpu()
        finally:
            self._running = None
            self._ran = None
            self._attend_by(NAME)

    def _attend_by(self, name: str) -> None:
        self.model.set_attn_implementation(name)
        self.model.config._attn_implementation = name  # a module with a table of its own looks here

    def pack(self) -> None:
        """Replaces every linear layer by its packed form and settles the row buckets that all of them agree on.

        Raises:
            ValueError: this kernel cannot hold the weights, or no two row counts agree.
        """
        packing = self._packing()
        for number in range(self.start, self.end):
            packing.layer(number)
        self._finish(packing)

    def pack_with_reference(self, ids: Sequence[int] | None, hidden: torch.Tensor | None) -> torch.Tensor:
        """`plain`, and each layer is packed as soon as it has run: what is computed is held twice for one layer at a time.

        Raises:
            ValueError: as `pack`.
        """
        packing = self._packing()
        said = self.plain(ids, hidden, packing.layer)
        self._finish(packing)
        return said

    def _packing(self) -> SpanPacker:
        self._watch.packs()
        span = PrunedSpan(self.model, self._base, self._slots, self.start, self.end)
        let_go, told = self._mapped.let_go, self._watch.packed
        return SpanPacker(span, self.checkpoint, self.kernel, self.threads, let_go, told, whole=self.shard is None)

    def join(self, summing: AllReduce, buckets: tuple[int, ...]) -> None:
        """Makes a packed shard one with those of the other ranks, which found the same `buckets` good."""
        assert self.shard is not None
        self.buckets = buckets
        for packed in self._inner:
            packed.buckets = buckets
        self.shard.join(self.model, summing)

    @property
    def constants(self) -> str:
        return self.fused.constants if isinstance(self.fused, NativeLayers) else ""

    def on_end(self, call: Callable[[str], None]) -> None:
        """A local stage ends with its process only."""

    def close(self) -> None:
        """Nothing to end: the weights go with the object."""

    def _finish(self, packing: SpanPacker) -> None:
        packed = packing.finish()
        self.buckets, self.fused, self.loose = packed.buckets, packed.fused, packed.loose
        self._inner = packed.inner
        if self.start > 0 and not isinstance(self.model.get_input_embeddings(), AbsentEmbedding):
            self.model.set_input_embeddings(AbsentEmbedding())  # a tied head's is packed now, and never looked up here
        self._mapped.close()
