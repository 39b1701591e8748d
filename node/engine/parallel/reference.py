"""Computes what a span must give with the plain model, one layer at a time, so that no more than one layer is in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from node.engine.model.checkpoint import Checkpoint
from node.engine.model.linear import Kernel
from node.engine.model.local_stage import LocalStage


def plain_output(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kernel: Kernel,
    threads: int,
    ids: Sequence[int] | None,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """What `LocalStage.plain` of the layers `[start, end)` returns for `ids` or `hidden`, by transformers' own modules."""
    for number in range(start, end):
        layer = LocalStage(checkpoint, number, number + 1, kernel, threads)
        hidden, ids = layer.plain(ids, hidden), None
    assert hidden is not None, "a span has at least one layer"
    return hidden
