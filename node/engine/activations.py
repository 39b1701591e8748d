"""Activations between two stages: raw little-endian rows on the wire, tensors here."""

from __future__ import annotations

import torch

from node.engine.api import HiddenOut
from node.engine.row import Pushed
from node.engine.rows import Piece, StepPlan


def activations(piece: Piece, part: Pushed) -> torch.Tensor:
    """What of a push belongs to the piece, `[rows, hidden]`; its element size tells float32 from bfloat16."""
    hidden_size = piece.row.hidden_size
    dtype = torch.float32 if len(part.data) == 4 * part.count * hidden_size else torch.bfloat16
    rows = torch.frombuffer(bytearray(part.data), dtype=dtype).view(part.count, hidden_size)
    first = max(piece.position - part.position, 0)
    return rows[first : min(piece.position + piece.count - part.position, part.count)]


def hidden_outputs(plan: StepPlan, hidden: torch.Tensor) -> list[HiddenOut]:
    """A step's activations `[rows, hidden]`, cut into those of each sequence."""
    outputs = []
    row = 0
    for piece in plan.pieces:
        rows = hidden[row : row + piece.count].contiguous()
        raw = rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows
        data = raw.numpy().tobytes()
        outputs.append(HiddenOut(piece.row.key, piece.position, piece.count, data, piece.names, piece.draft, piece.rewinds))
        row += piece.count
    return outputs
