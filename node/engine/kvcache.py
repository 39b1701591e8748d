"""The tensors behind the blocks: one contiguous buffer a sequence, layer and side, grown block by block.

`[kv_heads, capacity, head_dim]`, the capacity a whole number of blocks, so attention reads a zero-copy view of any
multiple of 512 tokens, which is what the exactness rules ask for. Growing copies once in 512 tokens (under half a
percent of what attention reads in between). What lies behind a sequence's end is always zero: it is masked, but 0 x NaN
would not be, and nothing of another sequence can be there.
"""

from __future__ import annotations

import torch

from node.engine.blocks import BLOCK_TOKENS, blocks_for


class SequenceKV:
    """Keys and values of one sequence on the layers it uses here. Touched by the engine thread only."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, layer: int, position: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores `k`, `v` `[kv_heads, count, head_dim]` at `position …`; writing a position again replaces it."""
        end = position + k.shape[1]
        keys, values = self._room(layer, end, k, v)
        keys[:, position:end] = k
        values[:, position:end] = v

    def read(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views `[kv_heads, end - first, head_dim]`; `end` may reach to the end of the last block."""
        keys, values = self._layers[layer]
        return keys[:, first:end], values[:, first:end]

    def _room(self, layer: int, tokens: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        held = self._layers.get(layer)
        if held is not None and held[0].shape[1] >= tokens:
            return held
        capacity = blocks_for(tokens) * BLOCK_TOKENS
        grown = []
        for side, new in enumerate((k, v)):
            buffer = new.new_zeros(new.shape[0], capacity, new.shape[2])
            if held is not None:
                buffer[:, : held[side].shape[1]] = held[side]
            grown.append(buffer)
        self._layers[layer] = (grown[0], grown[1])
        return self._layers[layer]
