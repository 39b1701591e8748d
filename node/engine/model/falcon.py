"""Falcon's attention for this package: its module has a table of attention classes instead of `AttentionInterface`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.falcon import modeling_falcon

from node.engine.model.attention import NAME, mesh_attention


class FalconMeshAttention(modeling_falcon.FalconAttention):
    """Falcon's weights and eager forward, and a forward over packed rows where attention is set to `NAME`."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes attention of `hidden_states` `[1, rows, hidden]`; cosines and sines come as `position_embeddings`."""
        if self.config._attn_implementation != NAME:
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = (side.transpose(1, 2) for side in self._split_heads(self.query_key_value(hidden_states)))
        if self.new_decoder_architecture:  # it repeats keys and values for each query head; one copy is enough here
            assert self.num_kv_heads is not None
            group = self.num_heads // self.num_kv_heads
            key, value = key[:, ::group], value[:, ::group]
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        answer, _ = mesh_attention(self, query, key, value, None, self.inv_norm_factor)
        return self.dense(answer.flatten(2)), None


modeling_falcon.FALCON_ATTENTION_CLASSES[NAME] = FalconMeshAttention
