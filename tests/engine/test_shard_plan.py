"""Which matrices are cut how, and which models cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest
from node.engine.model.shard_plan import ShardedModelShape, ShardPlan, TensorSplit, plan_shards

pytestmark = pytest.mark.no_kernel

PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
SHAPE = ShardedModelShape("toy", "llama", PLAN, heads=8, kv_heads=2, mixture=False)


def test_each_matrix_is_cut_as_the_plan_says() -> None:
    shard_plan = plan_shards(SHAPE, 2)
    layer = "model.layers.11."
    assert shard_plan.split_of(layer + "self_attn.q_proj") is TensorSplit.OUTPUTS
    assert (
        shard_plan.split_of(layer + "self_attn.k_proj") is shard_plan.split_of(layer + "self_attn.v_proj") is TensorSplit.KV_HEADS
    )
    assert shard_plan.split_of(layer + "self_attn.o_proj") is shard_plan.split_of(layer + "mlp.down_proj") is TensorSplit.INPUTS
    assert (
        shard_plan.split_of(layer + "self_attn.q_norm")
        is shard_plan.split_of("lm_head")
        is shard_plan.split_of("model.norm")
        is None
    )


@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_query_heads_meet_their_own_keys_on_every_rank(ranks: int, copies: int) -> None:
    shard_plan = plan_shards(SHAPE, ranks)
    assert shard_plan.kv_copies == copies
    dim = 16
    shared = SHAPE.heads // SHAPE.kv_heads
    for rank in range(ranks):
        heads = {at // dim for at in shard_plan.part(TensorSplit.OUTPUTS, SHAPE.heads * dim, rank)}
        kv_heads = {at // dim for at in shard_plan.part(TensorSplit.KV_HEADS, SHAPE.kv_heads * dim, rank)}
        assert {head // shared for head in heads} == kv_heads


@given(st.integers(1, 64), st.integers(64, 300_000))
def test_every_token_of_the_vocabulary_has_one_rank(ranks: int, size: int) -> None:
    shard_plan = ShardPlan(ranks, 8, ())
    parts = [shard_plan.vocabulary(size, rank) for rank in range(ranks)]
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, size)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 512))
def test_inputs_and_outputs_are_cut_alike_and_whole(ranks: int, width: int) -> None:
    shard_plan = ShardPlan(ranks, 8, ())
    size = ranks * width
    for cut in (TensorSplit.INPUTS, TensorSplit.OUTPUTS):
        assert [at for rank in range(ranks) for at in shard_plan.part(cut, size, rank)] == list(range(size))


def test_what_does_not_fall_into_equal_parts_is_an_error() -> None:
    with pytest.raises(ValueError, match="11 inputs cannot be cut into 2 equal parts"):
        plan_shards(SHAPE, 2).part(TensorSplit.INPUTS, 11, 0)


@pytest.mark.parametrize(
    ("shape", "ranks", "reason"),
    [
        (SHAPE, 3, "its 8 attention heads do not divide by 3"),
        (replace(SHAPE, heads=12, kv_heads=6), 4, "neither do its 6 key and value heads divide by 4, nor 4 by them"),
        (replace(SHAPE, mixture=True), 2, "its experts are not cut"),
        (replace(SHAPE, plan={}), 2, "transformers knows no plan for it"),
        (
            replace(SHAPE, plan={**PLAN, "layers.*.self_attn.qkv_proj": "colwise_gather_output"}),
            2,
            "self_attn.qkv_proj does not fall into parts of one rank each",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_by_name_and_reason(shape: ShardedModelShape, ranks: int, reason: str) -> None:
    with pytest.raises(BadRequest, match=rf"toy \(llama\) cannot be computed by {ranks} workers: {reason}; .* would|{reason}"):
        plan_shards(shape, ranks)


@pytest.mark.parametrize("ranks", [0, -1, 65])
def test_a_senseless_number_of_workers_is_refused(ranks: int) -> None:
    with pytest.raises(BadRequest, match="expected 1 to 64 workers"):
        plan_shards(SHAPE, ranks)
