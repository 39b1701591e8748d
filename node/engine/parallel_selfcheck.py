"""What a span must compute, whole and plain: layer by layer, so that no more than one layer is held at a time."""

from __future__ import annotations

import torch

from node.engine import selfcheck
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.linear import Kernel
from node.engine.model.stage import Stage


def plain_output(checkpoint: Checkpoint, start: int, end: int, kernel: Kernel, threads: int) -> torch.Tensor:
    """As `selfcheck.plain_output` of a stage `[start, end)`, with transformers' own modules, uncut, in the kernel's dtype."""
    ids: list[int] | None = None
    hidden: torch.Tensor | None = None
    for number in range(start, end):
        layer = Stage(checkpoint, number, number + 1, kernel, threads)
        if number == start:
            probe = selfcheck.SelfcheckInput(layer, seed=1, count=selfcheck.PROBE_TOKENS)
            ids, hidden = probe.ids, probe.hidden
        hidden, ids = layer.plain(ids, hidden), None
    assert hidden is not None
    return hidden.float()
