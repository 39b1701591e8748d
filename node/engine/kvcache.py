"""The tensors behind the blocks: one contiguous buffer a sequence and layer, grown as the sequence grows.

`[2, 1, kv_heads, capacity, dim]` (keys, then values), so attention reads zero-copy views of any length. Within the first
block the capacity doubles from 128 tokens, so short sequences of small models take little; then it grows block by block:
one copy in 512 tokens, under half a percent of what attention reads in between. What lies behind a sequence's end is always
zero: it is masked, but 0 x NaN would not be, and nothing of another sequence can be there.
"""

from __future__ import annotations

import torch

from node.engine.blocks import BLOCK_TOKENS, blocks_for

STRETCH = 128  # positions: attention reads keys in whole stretches, so capacities are whole stretches too


def capacity_for(tokens: int) -> int:
    """Tokens to make room for; never more than the blocks that hold `tokens`."""
    for early in (STRETCH, 2 * STRETCH):
        if tokens <= early:
            return early
    return blocks_for(tokens) * BLOCK_TOKENS


class SequenceKV:
    """Keys and values of one sequence on the layers it uses here. Touched by one thread at a time."""

    def __init__(self) -> None:
        self._layers: dict[int, torch.Tensor] = {}

    def write(self, layer: int, position: int, kv: torch.Tensor) -> None:
        """Stores `kv` `[2, kv_heads, count, dim]` at `position …`; writing a position again replaces it."""
        end = position + kv.shape[2]
        buffer = self._layers.get(layer)
        if buffer is None or buffer.shape[3] < end:
            buffer = self._grown(buffer, end, kv)
            self._layers[layer] = buffer
        buffer[:, 0, :, position:end] = kv

    def read(self, layer: int, first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of keys and values `[1, kv_heads, length, dim]` from position `first` on, up to the end of a stretch."""
        keys, values = self._layers[layer].narrow(3, first, length).unbind(0)
        return keys, values

    @staticmethod
    def _grown(old: torch.Tensor | None, tokens: int, like: torch.Tensor) -> torch.Tensor:
        grown = like.new_zeros(2, 1, like.shape[1], capacity_for(tokens), like.shape[3])
        if old is not None:
            grown[:, :, :, : old.shape[3]] = old
        return grown
