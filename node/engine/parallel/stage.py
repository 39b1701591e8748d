"""A stage whose span several worker processes compute together (`node.engine.model.stage`).

Every rank computes every step, with its part of the heads and of the MLP, from the same message. Keys and values stay in the
ranks; this process holds handles, and what is dropped here is dropped by the ranks with the next step.
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
from node.engine.parallel.reference import reference_output
from node.engine.parallel.worker_group import WorkerGroup, WorkersLost

LOAD_TIMEOUT_S = 1800.0  # for a large model on a slow disk; a rank that ends meanwhile is noticed at once
STEP_TIMEOUT_S = 60.0  # of a step, and of each all-reduce; long before, peers stop sending work to a stalled node


class RankHandle:
    """A handle of a sequence or page that the ranks store under a number until this object is freed."""

    _numbers = itertools.count()

    def __init__(self, changes: deque[Change], page: bool) -> None:
        self.number = next(self._numbers)
        weakref.finalize(self, changes.append, ForgetNumber(self.number, page)).atexit = False


class SharedKV(RankHandle):
    """A handle of one sequence's keys and values, which are split over the ranks; the interface of `SequenceKV`."""

    def __init__(self, changes: deque[Change]) -> None:
        super().__init__(changes, page=False)
        self._changes = changes

    def page(self, position: int, count: int, layers: range) -> SharedPage:
        """Makes the ranks keep a copy of the positions `position … position + count - 1`; returns its handle."""
        page = SharedPage(self._changes, page=True)
        self._changes.append(KeepPage(page.number, self.number, position, count, layers.start, layers.stop))
        return page

    def restore(self, pages: Sequence[SharedPage]) -> None:
        """Begins the sequence with the contents of the pages, in order from position 0 on."""
        self._changes.append(RestoreSequence(self.number, tuple(page.number for page in pages)))


class SharedPage(RankHandle):
    """A handle of a page that the ranks keep."""


class ParallelStage:
    """A span that `ranks` worker processes load and compute, from `pack` on; see `node.engine.model.stage`."""

    holds_kv = False
    constants_digest = ""

    def __init__(
        self,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        kernel: Kernel,
        threads: int,
        ranks: int,
        step_timeout_s: float = STEP_TIMEOUT_S,
        start_workers: Callable[[int], WorkerGroup] = WorkerGroup,
    ) -> None:
        """Plans the split. `threads`: of each rank; `start_workers` starts that many. Raises BadRequest: it cannot be split."""
        self.shard_plan = shard_plan_of(checkpoint, ranks)
        self.checkpoint = checkpoint
        self.start, self.end, self.layers = start, end, checkpoint.layers
        self.kernel = kernel
        self.threads = threads
        self.ranks = ranks
        self.has_unpacked_weights = False  # models with experts are not split
        self.kv_copies = self.shard_plan.kv_copies
        self.parameters = 0  # of all ranks together
        self.windows: set[int] = set()
        self._step_timeout_s = step_timeout_s
        self._start_workers = start_workers
        self._changes: deque[Change] = deque()  # since the last step; any thread may append
        self._lock = threading.Lock()
        self._steps = itertools.count()
        self._workers: WorkerGroup | None = None

    def pack(self) -> None:
        """Starts the workers, which load their parts and connect to each other.

        Raises:
            ValueError: this kernel cannot hold the weights.
            BadRequest: no kernel can compute the model on these ranks.
            WorkersLost: a worker has ended.
        """
        workers = self._start_workers(self.ranks)
        directory = Path(tempfile.mkdtemp(prefix="mesh-ranks-"))  # readable by this user alone; until the ranks are connected
        try:
            workers.send_to_each([self._load_shard(rank, directory / "file") for rank in range(self.ranks)], self._step_timeout_s)
            loaded = workers.receive_from_all(ShardLoaded, LOAD_TIMEOUT_S)
            for each in loaded:
                if each.refused:
                    raise BadRequest(each.refused, "model", "model_not_servable") if each.unservable else ValueError(each.refused)
            buckets = tuple(count for count in loaded[0].buckets if all(count in each.buckets for each in loaded))
            if not buckets:
                raise ValueError(f"{self.kernel.name}: the ranks have no number of rows in common")
            workers.send_to_all(JoinGroup(buckets), self._step_timeout_s)
            workers.receive_from_all(GroupJoined, self._step_timeout_s)
        except BaseException:
            workers.end()
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        assert len(loaded) == self.ranks
        self.parameters = sum(each.parameters for each in loaded)
        self._workers = workers

    def pack_with_reference(self, ids: Sequence[int] | None, hidden: torch.Tensor | None) -> torch.Tensor:
        """Computes the reference of the whole span in this process, then packs.

        Raises: as `pack`.
        """
        expected = reference_output(self.checkpoint, self.start, self.end, self.kernel, self.threads, ids, hidden)
        self.pack()
        return expected

    def _load_shard(self, rank: int, meeting: Path) -> LoadShard:
        directory = str(self.checkpoint.directory.resolve())
        where = self.start, self.end, self.kernel.name, self.threads
        return LoadShard(directory, *where, rank, self.ranks, "cpu", str(meeting), self._step_timeout_s)

    @property
    def processes(self) -> tuple[int, ...]:
        """The workers' process ids, by rank."""
        return () if self._workers is None else self._workers.processes

    def sequence(self) -> object:
        """Returns a handle of the keys and values of a new sequence: a `SharedKV`, with the interface of `SequenceKV`."""
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
            WorkersLost: a worker has ended, or did not answer in time; then all of them have been ended.
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
            self._workers.send_to_all(step, self._step_timeout_s)
            done = self._workers.receive_from_all(ForwardDone, self._step_timeout_s)
            if any(each.number != number for each in done):
                self._workers.end("a rank is out of step")
                raise WorkersLost("a rank is out of step")
        self.windows.update(done[0].windows)
        if logits_at and end == self.layers:
            parts = [_tensor(each.data, torch.float32, len(logits_at)) for each in done]
            return torch.cat(parts, 1)
        return _tensor(done[0].data, self.kernel.dtype, len(positions))

    def on_end(self, call: Callable[[str], None]) -> None:
        """Calls `call` once with the reason, from any thread, when the workers end before `close`."""
        assert self._workers is not None
        self._workers.on_end(call)

    def close(self) -> None:
        """Ends the workers, after the running step (*blocking*)."""
        with self._lock:
            workers, self._workers = self._workers, None
        if workers is not None:
            workers.end()


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().data)


def _tensor(data: bytes, dtype: torch.dtype, rows: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(rows, -1)
