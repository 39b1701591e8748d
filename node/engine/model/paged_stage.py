"""A stage on another device than the CPU: the same model, layers and rules, with paged keys and values.

Rows are padded to buckets that agree, as on the CPU, and a step's index arrays are copied to the device at once. Decoding
steps with recurring shapes are recorded (`recorded`). All of this also runs on a CPU, where it is tested against
`LocalStage`; on a GPU it has not been run yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F

from node.engine.model.attention import PackedBatch, Segment
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.linear import Kernel, bucket_for
from node.engine.model.local_stage import LocalStage
from node.engine.model.packing import SpanPacker
from node.engine.model.progress import LoadTracker
from node.engine.paged.attention import ATTENTION, PagedStep
from node.engine.paged.kv import PagedKV, PagedStore
from node.engine.paged.plan import PagedPlan, PagedSegment, padded_decode, plan_step
from node.engine.paged.recorded import RecordedSteps, Recorder, cuda_graph
from node.engine.paged.staging import Staging

MAX_RECORDED_ROWS = 64  # larger steps compute for so long that kernel launches cost nothing


class DeviceStage(LocalStage):
    """A loaded span on `device`. `forward` takes and returns tensors in host memory; one thread at a time may call it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        kernel: Kernel,
        threads: int,
        tracker: LoadTracker | None = None,
        *,
        device: torch.device,
        record: Recorder | None = None,
    ) -> None:
        """Loads the span. `record`: how decoding steps are recorded; None: not at all.

        Raises:
            BadRequest: as `load_model`.
        """
        super().__init__(checkpoint, start, end, kernel, threads, tracker)
        self.device = device
        self.model.to(device)
        self._paged = PagedStore(device)
        self._staging = Staging(device)
        self._attention = ATTENTION[kernel.attention]
        self.recorded = None if record is None else RecordedSteps(record, self._staging)

    def _finish(self, packing: SpanPacker) -> None:
        """Also runs one step, so that an operation that this device lacks is an error of `pack`, which refuses this kernel."""
        super()._finish(packing)
        ids = [0, 1, 2] if self.start == 0 else None
        hidden = None if ids else torch.zeros(3, self.checkpoint.hidden_size)
        at = [2] if self.end == self.layers else []
        self.forward(self.start, self.end, [Segment(0, 3, 0, self.sequence())], range(3), ids=ids, hidden=hidden, logits_at=at)

    def sequence(self) -> Any:
        """Returns the keys and values of a new sequence: a `PagedKV`, with the interface of `SequenceKV`."""
        return PagedKV(self._paged)

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
        """As `Stage.forward`; the rows of `segments` are consecutive from row 0 on."""
        rows = len(positions)
        assert sum(segment.count for segment in segments) == rows, "every row belongs to a segment"
        bucket = bucket_for(rows, self.buckets)
        has_logits = end == self.layers and len(logits_at) > 0
        logit_count = bucket_for(len(logits_at), self.buckets) if has_logits else 0
        all_rows = has_logits and logit_count == bucket and len(logits_at) == rows
        paged = [_paged_segment(segment) for segment in segments]
        recorded = self._recorder(paged, bucket) if all_rows or not has_logits else None
        if recorded is not None:
            paged = padded_decode(paged, bucket)  # a recording has fixed shapes
        plan = plan_step(paged, ids or (), logits_at if has_logits else (), bucket, logit_count)
        arrays = torch.tensor(plan.arrays.flat())
        activations = None if hidden is None else F.pad(hidden.to(self.kernel.dtype), (0, 0, 0, bucket - rows))
        compute = partial(self._on_device, start, end, plan, has_logits, all_rows)
        out = None
        if recorded is not None:
            out = recorded.run((start, end, plan.sizes, all_rows), self._paged.generation, arrays, activations, compute)
        if out is None:
            out = compute(self._staging.to_device(arrays), None if activations is None else self._staging.to_device(activations))
        return self._staging.to_host(out[: len(logits_at) if has_logits else rows])

    def _recorder(self, segments: Sequence[PagedSegment], bucket: int) -> RecordedSteps | None:
        """Returns the recorder of a step of these segments; None where its shapes vary or its code waits for the device."""
        if self.recorded is None or not self.recorded.works or self.fused is None or bucket > MAX_RECORDED_ROWS:
            return None
        return self.recorded if all(segment.count == 1 for segment in segments) else None

    def _on_device(
        self,
        start: int,
        end: int,
        plan: PagedPlan,
        has_logits: bool,
        all_rows: bool,
        arrays: torch.Tensor,
        activations: torch.Tensor | None,
    ) -> torch.Tensor:
        """Computes the step from tensors on the device; `arrays`: the flat `StepArrays` of `plan`."""
        step = PagedStep.of(self._paged, plan, arrays, self._attention)
        tensors = step.tensors
        batch = PackedBatch([], start, end, None if activations is None else activations[None], paged=step)
        logit_rows = tensors.logit_rows if has_logits else None
        return self._compute(batch, tensors.positions, tensors.ids, activations, logit_rows, all_rows)


def device_stage(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kernel: Kernel,
    threads: int,
    tracker: LoadTracker | None,
    device: torch.device,
    graphs: bool,
) -> DeviceStage:
    """Returns a stage on `device`; `graphs`: decoding steps are recorded as CUDA graphs."""
    record = cuda_graph(device) if graphs and device.type == "cuda" else None
    return DeviceStage(checkpoint, start, end, kernel, threads, tracker, device=device, record=record)


def _paged_segment(segment: Segment) -> PagedSegment:
    kv = cast(PagedKV, segment.kv)
    kv.expect(segment.position + segment.count)
    return PagedSegment(segment.row, segment.count, segment.position, kv.pages)
