"""What a stage must show before it serves: that it computes what the plain model does, and that it is exact.

Both are tried on the real weights of the span with a short made-up sequence. The first comparison is between
different kernels, so it allows rounding; the second allows nothing.
"""

from __future__ import annotations

import torch

from node.engine.model.attention import Segment
from node.engine.model.checkpoint import sliding_window
from node.engine.model.local_stage import LocalStage
from node.engine.model.stage import Stage

PROBE_TOKENS = 41  # neither a multiple of 8 nor of any bucket
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# Of one kernel, and of quantised weights, whose own rounding this cannot tell from an error: at 1 it finds noise only.
ROUNDED_TOLERANCE = {"fbgemm-fp16": 2e-2, "int8": 0.2, "int4": 1.0}


class SelfcheckInput:
    """A made-up sequence as the stage's input: tokens for a first stage, else activations of unit size."""

    def __init__(self, stage: Stage, seed: int, count: int) -> None:
        numbers = torch.Generator().manual_seed(seed)
        checkpoint = stage.checkpoint
        self.stage = stage
        self.ids = torch.randint(0, checkpoint.vocab_size, (count,), generator=numbers).tolist() if stage.start == 0 else None
        self.hidden = torch.randn(count, checkpoint.hidden_size, generator=numbers) if stage.start else None
        self.kv = stage.sequence()
        self.done = 0

    def take(self, count: int) -> tuple[list[int] | None, torch.Tensor | None, range]:
        span = slice(self.done, self.done + count)
        self.done += count
        ids = self.ids[span] if self.ids is not None else None
        hidden = self.hidden[span] if self.hidden is not None else None
        return ids, hidden, range(span.start, span.stop)


def run_together(stage: Stage, probes: list[tuple[SelfcheckInput, int]]) -> torch.Tensor:
    """One packed step of the given probes with the given counts: all output rows, in order."""
    segments: list[Segment] = []
    positions: list[int] = []
    ids: list[int] = []
    hidden: list[torch.Tensor] = []
    for probe, count in probes:
        some_ids, some_hidden, where = probe.take(count)
        segments.append(Segment(len(positions), count, where.start, probe.kv))
        positions += where
        ids += some_ids or []
        hidden += [] if some_hidden is None else [some_hidden]
    return stage.forward(
        stage.start,
        stage.end,
        segments,
        positions,
        ids=ids if stage.start == 0 else None,
        hidden=torch.cat(hidden) if hidden else None,
        logits_at=range(len(positions)) if stage.end == stage.layers else (),
    )


def plain_output(stage: LocalStage) -> torch.Tensor:
    """The oracle's answer to the probe; before the stage is packed."""
    probe = SelfcheckInput(stage, seed=1, count=PROBE_TOKENS)
    return stage.plain(probe.ids, probe.hidden).float()


def pack_with_reference(stage: Stage) -> torch.Tensor:
    """Packs the stage; returns what the plain model computes for the probe, float32 `[rows, hidden_size or vocab]`."""
    probe = SelfcheckInput(stage, seed=1, count=PROBE_TOKENS)
    return stage.pack_with_reference(probe.ids, probe.hidden).float()


def difference(stage: Stage, plain: torch.Tensor) -> float:
    """The relative distance to the plain model that three rows in four keep; one in two where a rounding flips experts."""
    probe = SelfcheckInput(stage, seed=1, count=PROBE_TOKENS)
    parts = [run_together(stage, [(probe, count)]) for count in (PROBE_TOKENS - 18, 16, 1, 1)]
    mine = torch.cat(parts).float()
    distance = (mine - plain).norm(dim=1) / plain.norm(dim=1).clamp_min(1e-9)
    return float(distance.quantile(0.5 if stage.checkpoint.mixture else 0.75))


def computes_like_the_plain_model(stage: Stage, plain: torch.Tensor) -> bool:
    kernel = stage.kernel
    rounded = ROUNDED_TOLERANCE.get(kernel.name, ROUNDED_TOLERANCE.get(kernel.quantize))
    return difference(stage, plain) <= (TOLERANCE[kernel.dtype] if rounded is None else rounded)


def looks_through_its_window(stage: Stage) -> bool:
    """Whether attention was told of the window that the config speaks of: the probe is shorter than most and cannot show it.

    Some models know their window in their own mask alone, which we do not read. After another check, which runs the stage.
    """
    window = sliding_window(stage.checkpoint.config, stage.start, stage.end)
    return window is None or window >= stage.checkpoint.max_model_len or window in stage.windows


def is_exact(stage: Stage) -> bool:
    """Whether a sequence comes out bit-equal alone in one piece, and in pieces among others."""
    alone = run_together(stage, [(SelfcheckInput(stage, 1, PROBE_TOKENS), PROBE_TOKENS)])
    probe, second, third = SelfcheckInput(stage, 1, PROBE_TOKENS), SelfcheckInput(stage, 2, 64), SelfcheckInput(stage, 3, 64)
    parts = [run_together(stage, [(second, 5), (probe, 17)])[5:]]
    parts.append(run_together(stage, [(third, 30), (probe, 16), (second, 1)])[30:46])
    for _ in range(PROBE_TOKENS - 33 - 3):
        parts.append(run_together(stage, [(second, 1), (third, 1), (probe, 1)])[2:])
    parts += [run_together(stage, [(probe, 1)]) for _ in range(3)]
    return torch.equal(torch.cat(parts), alone)
