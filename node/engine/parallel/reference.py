"""Computes the reference of a span one layer at a time, so that no more than one layer is in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from node.engine.model.checkpoint import Checkpoint
from node.engine.model.linear import Kernel
from node.engine.model.local_stage import LocalStage


def reference_output(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kernel: Kernel,
    threads: int,
    ids: Sequence[int] | None,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """Returns what `LocalStage.reference` of the layers `[start, end)` would return for `ids` or `hidden`."""
    for number in range(start, end):
        layer = LocalStage(checkpoint, number, number + 1, kernel, threads)
        hidden, ids = layer.reference(ids, hidden), None
    assert hidden is not None, "a span has at least one layer"
    return hidden
