"""The tokens that a step draws: for each piece that ends where its sequence does one, and one more behind each true guess."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from node.engine.api import SequenceKey
from node.engine.sampling.constraints import Constraints
from node.engine.scheduling.step_plan import Drawn, ScheduledChunk, StepPlan


def draw(plan: StepPlan, logits: torch.Tensor, constraints: Constraints) -> dict[SequenceKey, list[Drawn]]:
    """`logits` `[pieces that draw, with a row more for each of their guesses, vocab]`, float32."""
    drawing = [piece for piece in plan.pieces if piece.draws]
    rows = iter(logits.numpy() if drawing else ())  # without any, what came out are activations, in bfloat16 at times
    return {piece.row.key: _draw_piece(piece, rows, constraints) for piece in drawing}


def _draw_piece(piece: ScheduledChunk, rows: Iterator[NDArray[np.float32]], constraints: Constraints) -> list[Drawn]:
    logits = [next(rows) for _ in range(len(piece.draft) + 1)]
    history = list(piece.history)
    drawn: list[Drawn] = []
    for number, guess in enumerate([*piece.draft, None]):
        at = piece.draws_from + number
        one = constraints.draw(logits[number], piece.row.opened, at, history, piece.stop_ids)
        drawn.append(one)
        if one.token is None or one.token != guess or one.ends:
            break
        if piece.history:
            history.append(one.token)
    return drawn
