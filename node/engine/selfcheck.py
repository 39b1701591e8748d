"""The self-check of a stage before it serves: it matches transformers' own code (the reference), and it is exact.

Both are tried on the real weights of the span with a short random sequence. The first comparison is between different
kernels, so it allows rounding; the second requires equal bits.
"""

from __future__ import annotations

import torch

from node.engine.model.attention import Segment
from node.engine.model.checkpoint import sliding_window
from node.engine.model.local_stage import LocalStage
from node.engine.model.stage import Stage

PROBE_TOKENS = 41  # neither a multiple of 8 nor of any bucket
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# For one kernel, and for quantised weights, whose rounding looks like an error: a limit of 1 finds only unrelated results.
ROUNDED_TOLERANCE = {"fbgemm-fp16": 2e-2, "int8": 0.2, "int4": 1.0}


class SelfcheckInput:
    """A random sequence as the stage's input: tokens for a first stage, else activations of unit size."""

    def __init__(self, stage: Stage, seed: int, count: int) -> None:
        numbers = torch.Generator().manual_seed(seed)
        checkpoint = stage.checkpoint
        self.stage = stage
        self.ids = torch.randint(0, checkpoint.vocab_size, (count,), generator=numbers).tolist() if stage.start == 0 else None
        self.hidden = torch.randn(count, checkpoint.hidden_size, generator=numbers) if stage.start else None
        self.kv = stage.sequence()
        self.done = 0

    def take(self, count: int) -> tuple[list[int] | None, torch.Tensor | None, range]:
        """Returns tokens, activations and positions of the next `count` rows."""
        span = slice(self.done, self.done + count)
        self.done += count
        ids = self.ids[span] if self.ids is not None else None
        hidden = self.hidden[span] if self.hidden is not None else None
        return ids, hidden, range(span.start, span.stop)


def run_batch(stage: Stage, probes: list[tuple[SelfcheckInput, int]]) -> torch.Tensor:
    """Runs one step over the given counts of rows of the given sequences; returns all output rows, in order."""
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


def reference_output(stage: LocalStage) -> torch.Tensor:
    """Computes the reference for the probe; only before the stage is packed."""
    probe = SelfcheckInput(stage, seed=1, count=PROBE_TOKENS)
    return stage.reference(probe.ids, probe.hidden).float()


def pack_with_reference(stage: Stage) -> torch.Tensor:
    """Packs the stage; returns the reference for the probe, float32 `[rows, hidden_size or vocab]`."""
    probe = SelfcheckInput(stage, seed=1, count=PROBE_TOKENS)
    return stage.pack_with_reference(probe.ids, probe.hidden).float()


def distance_to_reference(stage: Stage, reference: torch.Tensor) -> float:
    """Returns the relative distance to the reference that three rows in four keep; with experts, one row in two.

    Rounding can change which experts a row uses, and then the row differs much.
    """
    probe = SelfcheckInput(stage, seed=1, count=PROBE_TOKENS)
    parts = [run_batch(stage, [(probe, count)]) for count in (PROBE_TOKENS - 18, 16, 1, 1)]
    mine = torch.cat(parts).float()
    distance = (mine - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-9)
    return float(distance.quantile(0.5 if stage.checkpoint.mixture else 0.75))


def matches_reference(stage: Stage, reference: torch.Tensor) -> bool:
    """Returns whether the packed stage computes the reference for the probe, within the rounding of its kernel."""
    kernel = stage.kernel
    rounded = ROUNDED_TOLERANCE.get(kernel.name, ROUNDED_TOLERANCE.get(kernel.quantize))
    return distance_to_reference(stage, reference) <= (TOLERANCE[kernel.dtype] if rounded is None else rounded)


def uses_its_sliding_window(stage: Stage) -> bool:
    """Returns whether attention got the sliding window of the config: the probe is shorter than most windows.

    Some models apply their window in their own mask alone, which is not read here. Only after a check that has run the stage.
    """
    window = sliding_window(stage.checkpoint.config, stage.start, stage.end)
    return window is None or window >= stage.checkpoint.max_model_len or window in stage.windows


def is_exact(stage: Stage) -> bool:
    """Returns whether a sequence has the same bits computed alone in one step, and in chunks in batches with others."""
    alone = run_batch(stage, [(SelfcheckInput(stage, 1, PROBE_TOKENS), PROBE_TOKENS)])
    probe, second, third = SelfcheckInput(stage, 1, PROBE_TOKENS), SelfcheckInput(stage, 2, 64), SelfcheckInput(stage, 3, 64)
    parts = [run_batch(stage, [(second, 5), (probe, 17)])[5:]]
    parts.append(run_batch(stage, [(third, 30), (probe, 16), (second, 1)])[30:46])
    for _ in range(PROBE_TOKENS - 33 - 3):
        parts.append(run_batch(stage, [(second, 1), (third, 1), (probe, 1)])[2:])
    parts += [run_batch(stage, [(probe, 1)]) for _ in range(3)]
    return torch.equal(torch.cat(parts), alone)
