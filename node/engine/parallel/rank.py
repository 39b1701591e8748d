"""One rank of a span, in a worker process of its own: it carries out the steps that its node sends.

Any error in a step ends the process, for the ranks would no longer compute the same steps; the node notices the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mesh.errors import BadRequest
from node.engine.kv.cache import Page, SequenceKV
from node.engine.model.all_reduce import join_group
from node.engine.model.attention import Segment
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.model.local_stage import LocalStage
from node.engine.model.tensor_shard import Shard, shard_plan_of
from node.engine.parallel.messages import (
    Change,
    Channel,
    ForwardDone,
    ForwardStep,
    GroupJoined,
    JoinGroup,
    KeepPage,
    LoadShard,
    RestoreSequence,
    ShardLoaded,
)


class Rank:
    """A loaded shard, with the sequences and pages stored in it."""

    def __init__(self, stage: LocalStage, first: bool) -> None:
        self._stage = stage
        self._first = first
        self._sequences: dict[int, SequenceKV] = {}
        self._pages: dict[int, Page] = {}

    def step(self, step: ForwardStep) -> ForwardDone:
        """Applies the step's changes, computes it, and returns this rank's part of the result."""
        assert (step.ids is None) != (step.hidden is None), "either tokens or activations"
        self._change(step.changes)
        segments = [Segment(each.row, each.count, each.position, self._sequence(each.sequence)) for each in step.segments]
        out = self._stage.forward(
            step.start,
            step.end,
            segments,
            step.positions,
            ids=step.ids,
            hidden=None if step.hidden is None else self._activations(step.hidden),
            logits_at=step.logits_at,
        )
        logits = bool(step.logits_at) and step.end == self._stage.layers
        windows = tuple(self._stage.windows) if self._first else ()
        return ForwardDone(step.number, tensor_bytes(out) if logits or self._first else b"", windows)

    def _activations(self, data: bytes) -> torch.Tensor:
        width = self._stage.checkpoint.hidden_size
        return torch.frombuffer(bytearray(data), dtype=self._stage.kernel.dtype).view(-1, width)

    def _sequence(self, number: int) -> SequenceKV:
        return self._sequences.get(number) or self._sequences.setdefault(number, self._stage.sequence())

    def _change(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if isinstance(change, KeepPage):
                layers = range(change.start, change.end)
                self._pages[change.page] = self._sequence(change.sequence).page(change.position, change.count, layers)
            elif isinstance(change, RestoreSequence):
                self._sequence(change.sequence).restore([self._pages[page] for page in change.pages])
            elif change.page:
                self._pages.pop(change.number, None)
            else:
                self._sequences.pop(change.number, None)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Returns the little-endian bytes of a tensor of any dtype."""
    return bytes(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def serve(channel: Channel) -> None:
    """Loads a shard, connects to the other ranks, then computes steps until the channel is closed."""
    begin = channel.receive(LoadShard)
    assert 0 <= begin.rank < begin.ranks
    torch.set_num_threads(begin.threads)
    try:
        checkpoint = read_checkpoint(Path(begin.directory))
        shard = Shard(shard_plan_of(checkpoint, begin.ranks), begin.rank)
        stage = LocalStage(checkpoint, begin.start, begin.end, KERNELS[begin.kernel], begin.threads, shard=shard)
        stage.pack()
    except (ValueError, RuntimeError, BadRequest) as error:
        channel.send(ShardLoaded(refused=str(error), unservable=isinstance(error, BadRequest)))
        return
    channel.send(ShardLoaded(stage.parameters, stage.buckets))
    join = channel.receive(JoinGroup)
    all_reduce = join_group(Path(begin.meeting), begin.rank, begin.ranks, torch.device(begin.device), begin.timeout_s)
    stage.join(all_reduce, join.buckets)
    channel.send(GroupJoined())
    rank = Rank(stage, begin.rank == 0)
    while True:
        channel.send(rank.step(channel.receive(ForwardStep)))
