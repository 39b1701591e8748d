"""A stage on another device than the CPU: the same model, layers and rules, with paged keys and values.

Rows are padded to buckets that agree, as on the CPU, and what a step needs goes over in one copy. Decoding steps of
well-known forms are recorded (`recorded`). Everything here runs on a CPU as well, where it is tested against the other stage;
on a GPU it has not been run yet.
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

MAX_RECORDED = 64  # rows; larger steps take so long that launches hide behind them


class DeviceStage(LocalStage):
    """The loaded span on `device`. `forward` may be called by one thread at a time; it takes and gives tensors of the host."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        kernel: Kernel,
        threads: int,
        watch: LoadTracker | None = None,
        *,
        device: torch.device,
        record: Recorder | None = None,
    ) -> None:
        """`record`: how decoding steps are recorded; None: not at all. Raises BadRequest, as `load_model`."""
        super().__init__(checkpoint, start, end, kernel, threads, watch)
        self.device = device
        self.model.to(device)
        self._paged = PagedStore(device)
        self._staging = Staging(device)
        self._attend = ATTENTION[kernel.attention]
        self.recorded = None if record is None else RecordedSteps(record, self._staging)

    def _finish(self, packing: SpanPacker) -> None:
        """And runs a step, for what this device cannot compute is this kernel's fault: an error as of a weight it cannot hold."""
        super()._finish(packing)
        ids = [0, 1, 2] if self.start == 0 else None
        hidden = None if ids else torch.zeros(3, self.checkpoint.hidden_size)
        at = [2] if self.end == self.layers else []
        self.forward(self.start, self.end, [Segment(0, 3, 0, self.sequence())], range(3), ids=ids, hidden=hidden, logits_at=at)

    def sequence(self) -> Any:
        """Keys and values of a new sequence: a `PagedKV`, which passes for a `SequenceKV`."""
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
        """As `LocalStage.forward`; the rows of `segments` stand one behind the other."""
        rows = len(positions)
        bucket = bucket_for(rows, self.buckets)
        last = end == self.layers and len(logits_at) > 0
        short = bucket_for(len(logits_at), self.buckets) if last else 0
        every = last and short == bucket and len(logits_at) == rows
        parts = [_part(segment) for segment in segments]
        recorded = self._recorder(parts, bucket) if every or not last else None
        if recorded is not None:
            parts = padded_decode(parts, bucket)
        plan = plan_step(parts, ids or (), logits_at if last else (), bucket, short)
        numbers = torch.tensor(plan.numbers.flat())
        taken = None if hidden is None else F.pad(hidden.to(self.kernel.dtype), (0, 0, 0, bucket - rows))
        compute = partial(self._on_device, start, end, plan, last, every)
        out = None
        if recorded is not None:
            out = recorded.run((start, end, plan.sizes, every), self._paged.generation, numbers, taken, compute)
        if out is None:
            out = compute(self._staging.up(numbers), None if taken is None else self._staging.up(taken))
        return self._staging.down(out[: len(logits_at) if last else rows])

    def _recorder(self, parts: Sequence[PagedSegment], bucket: int) -> RecordedSteps | None:
        """Where a step of these parts may be recorded: its shapes follow from few numbers, and the host asks nothing."""
        if self.recorded is None or not self.recorded.works or self.fused is None or bucket > MAX_RECORDED:
            return None
        return self.recorded if all(part.count == 1 for part in parts) else None

    def _on_device(
        self, start: int, end: int, plan: PagedPlan, last: bool, every: bool, flat: torch.Tensor, taken: torch.Tensor | None
    ) -> torch.Tensor:
        step = PagedStep.of(self._paged, plan, flat, self._attend)
        given = step.tensors
        batch = PackedBatch([], start, end, None if taken is None else taken[None], paged=step)
        return self._compute(batch, given.positions, given.ids, taken, given.wanted if last else None, every)


def device_stage(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kernel: Kernel,
    threads: int,
    watch: LoadTracker | None,
    device: torch.device,
    graphs: bool,
) -> DeviceStage:
    """A stage on a GPU; `graphs`: with recorded decoding steps."""
    record = cuda_graph(device) if graphs and device.type == "cuda" else None
    return DeviceStage(checkpoint, start, end, kernel, threads, watch, device=device, record=record)


def _part(segment: Segment) -> PagedSegment:
    kv = cast(PagedKV, segment.kv)
    kv.expect(segment.position + segment.count)
    return PagedSegment(segment.row, segment.count, segment.position, kv.pages)
