"""Falcon's attention through ours: its module has a table of classes of its own instead of transformers' interface."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.falcon import modeling_falcon

from node.engine.model.attention import NAME, mesh_attention


class FalconMeshAttention(modeling_falcon.FalconAttention):
    """Its weights and its own eager forward, and a forward over packed rows where ours is asked for."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`hidden_states` `[1, rows, hidden]`; rotary positions come as `position_embeddings`."""
        if self.config._attn_implementation != NAME:
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = (side.transpose(1, 2) for side in self._split_heads(self.query_key_value(hidden_states)))
        if self.new_decoder_architecture:  # which repeats keys and values for each query; one of each is enough for us
            assert self.num_kv_heads is not None
            apart = self.num_heads // self.num_kv_heads
            key, value = key[:, ::apart], value[:, ::apart]
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        answer, _ = mesh_attention(self, query, key, value, None, self.inv_norm_factor)
        return self.dense(answer.flatten(2)), None


modeling_falcon.FALCON_ATTENTION_CLASSES[NAME] = FalconMeshAttention
