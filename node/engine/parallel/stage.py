"""A stage whose span several worker processes compute together (`node.engine.model.stage`).

Every rank does every step, on its part of the heads and of the MLP; what a step needs is told to all of them alike. Keys
and values stay with the ranks: here are only their numbers, and what is dropped here is forgotten there with the next step.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from mesh.errors import BadRequest
from node.engine.model.attention import Segment
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.linear import Kernel
from node.engine.model.tensor_shard import shard_plan_of
from node.engine.parallel.messages import (
    Change,
    ForgetNumber,
    ForwardDone,
    ForwardStep,
    GroupJoined,
    JoinGroup,
    KeepPage,
    LoadShard,
    RestoreSequence,
    SegmentRows,
    ShardLoaded,
)
from node.engine.parallel.reference import plain_output
from node.engine.parallel.worker_group import WorkerGroup, WorkersLost

LOAD_TIMEOUT_S = 1800.0  # a part of a large model from a slow disk; a rank that dies meanwhile is noticed at once
STEP_TIMEOUT_S = 60.0  # of a step, and of each sum within it: far beyond any, for the node is passed over as stalled long before


class RankHandle:
    """Something that the ranks keep under a number, until no reference to this is left."""

    _numbers = itertools.count()

    def __init__(self, changes: deque[Change], page: bool) -> None:
        self.number = next(self._numbers)
        weakref.finalize(self, changes.append, ForgetNumber(self.number, page)).atexit = False


class SharedKV(RankHandle):
    """Keys and values of one sequence, cut over the ranks: stands for `SequenceKV`."""

    def __init__(self, changes: deque[Change]) -> None:
        super().__init__(changes, page=False)
        self._changes = changes

    def page(self, position: int, count: int, layers: range) -> SharedPage:
        """Has a copy kept of what is stored at `position … position + count - 1`."""
        page = SharedPage(self._changes, page=True)
        self._changes.append(KeepPage(page.number, self.number, position, count, layers.start, layers.stop))
        return page

    def restore(self, pages: Sequence[SharedPage]) -> None:
        """Begins the sequence with what the pages hold."""
        self._changes.append(RestoreSequence(self.number, tuple(page.number for page in pages)))


class SharedPage(RankHandle):
    """A page that the ranks keep."""


class ParallelStage:
    """A loaded span that `ranks` worker processes compute, from `pack` on; see `node.engine.model.stage`."""

    holds_kv = False
    constants = ""

    def __init__(
        self,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        kernel: Kernel,
        threads: int,
        ranks: int,
        step_timeout_s: float = STEP_TIMEOUT_S,
        hire: Callable[[int], WorkerGroup] = WorkerGroup,
    ) -> None:
        """Raises BadRequest: the model cannot be cut into so many parts. `threads`: of each rank; `hire`: starts that many."""
        self.shard_plan = shard_plan_of(checkpoint, ranks)
        self.checkpoint = checkpoint
        self.start, self.end, self.layers = start, end, checkpoint.layers
        self.kernel = kernel
        self.threads = threads
        self.ranks = ranks
        self.loose = False  # what is cut is packed
        self.kv_copies = self.shard_plan.kv_copies
        self.parameters = 0  # of all ranks together
        self.windows: set[int] = set()  # as `Stage.windows`
        self._step_timeout_s = step_timeout_s
        self._hire = hire
        self._changes: deque[Change] = deque()  # what came about since the last step; any thread may add to it
        self._lock = threading.Lock()
        self._steps = itertools.count()
        self._workers: WorkerGroup | None = None

    def pack(self) -> None:
        """Starts the workers; each loads its part.

        Raises:
            ValueError: this kernel cannot hold the weights.
            BadRequest: the model cannot be computed so.
            WorkersLost: a worker has ended.
        """
        workers = self._hire(self.ranks)
        meeting = Path(tempfile.mkdtemp(prefix="mesh-ranks-"))  # for this user alone; of no use once the ranks have met
        try:
            workers.tell([self._begin(rank, meeting / "file") for rank in range(self.ranks)], self._step_timeout_s)
            loaded = workers.hear(ShardLoaded, LOAD_TIMEOUT_S)
            for each in loaded:
                if each.refused:
                    raise BadRequest(each.refused, "model", "model_not_servable") if each.unservable else ValueError(each.refused)
            buckets = tuple(count for count in loaded[0].buckets if all(count in each.buckets for each in loaded))
            if not buckets:
                raise ValueError(f"{self.kernel.name}: the ranks have no number of rows in common")
            workers.tell_all(JoinGroup(buckets), self._step_timeout_s)
            workers.hear(GroupJoined, self._step_timeout_s)
        except BaseException:
            workers.end()
            raise
        finally:
            shutil.rmtree(meeting, ignore_errors=True)
        self.parameters = sum(each.parameters for each in loaded)
        self._workers = workers

    def pack_with_reference(self, ids: Sequence[int] | None, hidden: torch.Tensor | None) -> torch.Tensor:
        """Computes the reference whole and plain in this process, then packs.

        Raises: as `pack`.
        """
        plain = plain_output(self.checkpoint, self.start, self.end, self.kernel, self.threads, ids, hidden)
        self.pack()
        return plain

    def _begin(self, rank: int, meeting: Path) -> LoadShard:
        directory = str(self.checkpoint.directory.resolve())
        where = self.start, self.end, self.kernel.name, self.threads
        return LoadShard(directory, *where, rank, self.ranks, "cpu", str(meeting), self._step_timeout_s)

    @property
    def processes(self) -> tuple[int, ...]:
        """The workers' process ids, by rank."""
        return () if self._workers is None else self._workers.processes

    def sequence(self) -> object:
        """Keys and values of a new sequence: a `SharedKV`, which passes for a `SequenceKV`."""
        return SharedKV(self._changes)

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
        """As `Stage.forward`.

        Raises:
            WorkersLost: a worker has ended, or was not done in time; all of them are ended then.
        """
        with self._lock:
            if self._workers is None:
                raise WorkersLost("the span's workers were told to end")
            changes = tuple(self._changes.popleft() for _ in range(len(self._changes)))
            rows = tuple(SegmentRows(each.row, each.count, each.position, cast(Any, each.kv).number) for each in segments)
            data = None if hidden is None else _bytes(hidden.to(self.kernel.dtype))
            known = None if ids is None else tuple(ids)
            number = next(self._steps)
            step = ForwardStep(number, changes, start, end, rows, tuple(positions), known, data, tuple(logits_at))
            self._workers.tell_all(step, self._step_timeout_s)
            done = self._workers.hear(ForwardDone, self._step_timeout_s)
            if any(each.number != number for each in done):
                self._workers.end("a rank is out of step")
                raise WorkersLost("a rank is out of step")
        self.windows.update(done[0].windows)
        if logits_at and end == self.layers:
            parts = [_tensor(each.data, torch.float32, len(logits_at)) for each in done]
            return torch.cat(parts, 1)
        return _tensor(done[0].data, self.kernel.dtype, len(positions))

    def on_end(self, call: Callable[[str], None]) -> None:
        """Calls `call` once with the reason, from any thread, when the workers end and the stage was not closed."""
        assert self._workers is not None
        self._workers.on_end(call)

    def close(self) -> None:
        """Ends the workers, after the step under way (*blocking*)."""
        with self._lock:
            workers, self._workers = self._workers, None
        if workers is not None:
            workers.end()


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().data)


def _tensor(data: bytes, dtype: torch.dtype, rows: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(rows, -1)
