"""A model that copies: random weights of full size, made so that each token is followed by its neighbour in a short cycle.

What an answer that copies costs can be measured only on a model that copies, and random weights do not. Here the layers
compute all that they would, but add little to what the embedding says, and the head reads the next token of the cycle from
that. So a prompt that runs through the cycle is continued by itself, as a text that is quoted.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def teach_to_copy(model: Any, period: int, layer_share: float) -> None:
    """Token t is followed by t + 1 within its block of `period`; `layer_share`: what is left of the layers' own say."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= layer_share
    whole = len(head) // period * period
    tokens = torch.arange(whole)
    follows = tokens // period * period + (tokens + 1) % period
    head[follows] = embedding[tokens].clone()
