"""Sums over the ranks, in the order of the ranks: the same bits on every rank, for every row, however many stand beside it.

A library's all-reduce adds in an order that depends on where in the buffer an element lies, so a row's bits would depend on
its place in the batch once there are three summands. Here every rank gathers all parts and adds them one after the other,
in float32. For the short buffers of decoding that is also the quickest: one exchange instead of two.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from node.engine.model.linear import Rows

LOOPBACK = "127.0.0.1"


class AllReduce(Protocol):
    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts, float32, of one shape.

        Raises:
            RuntimeError: a rank is gone, or did not come in time.
        """


class GroupAllReduce:
    """Sums over a process group of torch's."""

    def __init__(self, group: Any, ranks: int) -> None:
        self._group = group
        self._ranks = ranks

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        parts = part.new_empty(self._ranks, *part.shape)
        self._group.allgather([list(parts)], [part.contiguous()]).wait()
        total = parts[0]
        for rank in range(1, self._ranks):
            total += parts[rank]
        return total


def join_group(meeting: Path, rank: int, ranks: int, device: torch.device, timeout_s: float) -> GroupAllReduce:
    """Meets the other ranks through the file `meeting`; all traffic stays on the loopback interface, or between the GPUs.

    Raises:
        RuntimeError: they did not all come in time.
    """
    store = torch._C._distributed_c10d.FileStore(str(meeting), ranks)
    store.set_timeout(timedelta(seconds=timeout_s))
    group: object
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timedelta(seconds=timeout_s)
        group = dist.ProcessGroupNCCL(store, rank, ranks, nccl)
    else:
        process_group: Any = dist.ProcessGroupGloo  # whose options have no type
        gloo = process_group._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        gloo._timeout = timedelta(seconds=timeout_s)
        group = dist.ProcessGroupGloo(store, rank, ranks, gloo)
    summing = GroupAllReduce(group, ranks)
    summing(torch.ones(1, device=device))  # all are here, and connected: the file is not needed any more
    return summing


class SummedProduct:
    """A product whose inputs are cut: each rank's is one summand of the answer, which is rounded once."""

    def __init__(self, product: Rows, summing: AllReduce) -> None:
        self._wide: Rows = getattr(product, "wide", None) or (lambda rows: product(rows).float())
        self._summing = summing

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._summing(self._wide(rows)).to(rows.dtype)

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """`other + product`."""
        return self._summing(self._wide(rows)).add_(other).to(rows.dtype)


class SharedEmbedding(nn.Module):
    """An embedding of which this rank holds the tokens `first …`: the others' rows come as sums with nothing but zeros."""

    def __init__(self, held: nn.Module, first: int, summing: AllReduce) -> None:
        super().__init__()
        self.held = held
        self._first = first
        self._summing = summing

    @property
    def weight(self) -> torch.Tensor:
        """The rank's part; models read its dtype at most."""
        weight = self.held.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[…] -> […, hidden]`."""
        places = ids - self._first
        count = self.weight.shape[0]
        here = (places >= 0) & (places < count)
        rows = self.held(places.clamp(0, count - 1)) * here[..., None]
        return self._summing(rows.float()).to(rows.dtype)
