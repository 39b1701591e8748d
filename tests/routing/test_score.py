"""Each term of the score by itself, in ms, and properties of the whole score."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.ids import NodeId
from mesh.view import Load, Peer
from routing.dispatches import DispatchedWork
from routing.score import (
    NEVER_FITS_MS,
    LoadEstimate,
    PoolMeans,
    RequestWork,
    ScoreTerms,
    ScoreWeights,
    costs,
    decode_ms,
    estimate,
    memory_ms,
    network_ms,
    pool_of,
    prefill_ms,
    queue_ms,
    redo_ms,
    region_ms,
    rtt_ms,
    terms,
    trust,
)
from tests.routing.meshes import MODEL, peer

ME = NodeId("me")
POOL = PoolMeans(running=4.0, waiting=2.0, prefill_tokens_queued=100.0, kv_used_share=0.5)


def there(running: float = 0.0, waiting: float = 0.0, queued: float = 0.0, rows: float = 1.0) -> LoadEstimate:
    return LoadEstimate(running, waiting, queued, math.inf, 2.0, 0.1, rows, counts_only=waiting > 0 and queued == 0)


def test_an_old_load_record_drifts_to_the_mean_of_the_pool() -> None:
    idle = Load(kv_blocks_total=10)
    fresh, old = estimate(idle, 0.0, 6, POOL), estimate(idle, 1e6, 6, POOL)
    assert (fresh.running, fresh.waiting, fresh.prefill_tokens_queued, fresh.kv_blocks_free) == (0.0, 0.0, 0.0, 10.0)
    assert (old.running, old.waiting, old.prefill_tokens_queued, old.kv_blocks_free) == (4.0, 2.0, 100.0, 5.0)
    assert trust(4.0, 4.0) == pytest.approx(1 / math.e)
    assert trust(-1.0, 4.0) == 1.0


def test_own_work_since_the_record_counts_fully_at_any_age() -> None:
    own = DispatchedWork(added=3, ended=1, prefill_tokens=60)
    assert estimate(Load(running=5), 0.0, 6, POOL, own).running == 7.0
    assert estimate(Load(), 1e6, 6, POOL, own).prefill_tokens_queued == 160.0
    assert estimate(Load(), 0.0, 6, PoolMeans(), DispatchedWork(ended=5)).running == 0.0


def test_unmeasured_speeds_are_those_of_the_pool() -> None:
    peers = [peer("a", (0, 6), load=Load(step_ms=12.0, prefill_tok_s=100.0)), peer("b", (0, 2), load=Load(step_ms=8.0))]
    pool = pool_of(peers, MODEL)
    assert (pool.step_ms_per_layer, pool.prefill_ms_per_token_layer) == pytest.approx((3.0, 1000 / 600))
    unknown = estimate(Load(), 0.0, 6, pool)
    assert (unknown.step_ms_per_layer, unknown.prefill_ms_per_token_layer) == pytest.approx((3.0, 1000 / 600))
    assert pool_of([], MODEL) == PoolMeans()


@pytest.mark.parametrize(
    ("at", "own_added", "expected_ms"),
    [
        (there(), 0, 0.0),
        (there(running=50), 5, 0.0),  # rows share steps: they slow decode, they are no queue
        (there(queued=100), 0, 100 * 0.1 * 6),
        (there(queued=100, waiting=3), 0, 100 * 0.1 * 6),  # the waiting are those whose tokens are queued
        (there(waiting=2, rows=16), 0, 2 * 4000 / 16),
        (there(waiting=2, rows=16), 2, 4 * 4000 / 16),
        (there(waiting=2, rows=1), 0, 2 * 4000 / 8),  # a node with so few places would not batch at all
    ],
)
def test_the_wait_follows_from_the_prefill_rate_or_the_residency(at: LoadEstimate, own_added: int, expected_ms: float) -> None:
    assert queue_ms(at, 6, own_added, 4.0) == pytest.approx(expected_ms)


def test_prefill_and_decode_scale_with_layers_and_tokens_that_are_not_cached() -> None:
    work = RequestWork(prompt_tokens=100, output_tokens=10)
    assert prefill_ms(work, 0, 6, 0.1) == pytest.approx(60.0)
    assert prefill_ms(work, 40, 3, 0.1) == pytest.approx(18.0)
    assert prefill_ms(work, 400, 3, 0.1) == 0.0
    assert decode_ms(work, 6, there()) == pytest.approx(10 * 6 * 2.0)
    assert decode_ms(work, 6, there(running=9, rows=1)) == pytest.approx(2 * 10 * 6 * 2.0)  # twice the rows' share of 8 + 1


def test_a_stage_of_a_split_path_pays_its_hop_for_every_token() -> None:
    assert network_ms(10.0, 100, solo=True) < 11.0
    assert network_ms(10.0, 100, solo=False) == pytest.approx(101 * 5.5)


def test_the_redo_term_is_the_odds_of_a_failure_times_the_work() -> None:
    assert redo_ms(0.0, 0.0, 1900.0) == pytest.approx(100.0)
    assert redo_ms(79.0, 80.0, 100.0) > 390.0
    assert redo_ms(0.0, 980.0, 1000.0) < 1.1


@pytest.mark.parametrize(
    ("needed", "free", "total", "expected_ms"),
    [(0, 0, 10, 0), (4, 4, 10, 0), (4, 2, 10, 5000), (4, 0, 10, 10_000), (11, 10, 10, NEVER_FITS_MS), (4, 0, 0, 0)],
)
def test_missing_memory_costs_in_proportion_to_the_missing_share(needed: int, free: int, total: int, expected_ms: float) -> None:
    assert memory_ms(needed, free, total) == expected_ms


def test_the_own_region_and_the_measured_round_trip() -> None:
    assert [region_ms(*pair) for pair in (("eu", "eu"), ("eu", ""), ("", "us"), ("eu", "us"))] == [0.0, 0.0, 0.0, 25.0]
    near, far = peer("a", (0, 6), rtt_s=None, region="eu"), peer("b", (0, 6), rtt_s=None, region="us")
    assert rtt_ms(near, ME, "eu") < rtt_ms(far, ME, "eu")
    assert rtt_ms(peer("c", (0, 6), rtt_s=0.02), ME, "") == 20.0
    assert rtt_ms(far, NodeId("b"), "us") == 0.0
    estimated = replace(far, rtt_estimate_s=0.04)
    assert rtt_ms(estimated, ME, "eu") == 40.0, "an estimate by coordinates is better than a guess"
    assert rtt_ms(replace(estimated, rtt_s=0.02), ME, "eu") == 20.0, "a measurement is better than an estimate"


def cost_of(node: Peer, work: RequestWork | None = None, layers: int = 6, **more: object) -> ScoreTerms:
    return costs(node, layers, 6, work or RequestWork(prompt_tokens=64), POOL, 0.0, me=ME, my_region="eu", **more)  # type: ignore[arg-type]


def test_a_weight_of_zero_switches_a_term_off() -> None:
    node = peer("a", (0, 6), region="us", rtt_s=0.01, load=Load(prefill_tokens_queued=10))
    assert set(terms(cost_of(node))) == {"queue", "prefill", "decode", "network", "redo", "region"}
    off = cost_of(node, weights=ScoreWeights(region=0.0, redo=0.0, queue=0.0))
    assert set(terms(off)) == {"prefill", "decode", "network"}
    assert off.total == pytest.approx(sum(terms(off).values()), abs=0.01)


def test_tokens_that_the_peer_has_cached_are_not_read_again() -> None:
    node = peer("a", (0, 6))
    cold, warm = cost_of(node), cost_of(node, RequestWork(prompt_tokens=64, cached_tokens={node.id: 48}))
    assert warm.prefill == pytest.approx(cold.prefill / 4)


def test_this_nodes_own_record_is_never_stale() -> None:
    mine = replace(peer("me", (0, 6)), load_at=-1e6)
    assert cost_of(mine).queue == 0.0 < cost_of(replace(mine, id=NodeId("other"))).queue


LOADS = st.builds(
    Load,
    running=st.integers(0, 100),
    waiting=st.integers(0, 100),
    kv_blocks_used=st.integers(0, 50),
    kv_blocks_total=st.sampled_from([0, 50, 100]),
    prefill_tokens_queued=st.integers(0, 10_000),
    prefill_tok_s=st.sampled_from([0.0, 10.0, 5000.0]),
    step_ms=st.sampled_from([0.0, 0.5, 100.0]),
)


@given(load=LOADS, tokens=st.integers(0, 5000), out=st.integers(0, 5000), blocks=st.integers(0, 200), age_s=st.floats(0, 1e4))
def test_a_score_is_finite_not_negative_and_affine_in_the_layers(
    load: Load, tokens: int, out: int, blocks: int, age_s: float
) -> None:
    node = replace(peer("a", (0, 6), load=load), load_at=-age_s)
    work = RequestWork(tokens, out, blocks)
    none, one, five = (cost_of(node, work, layers, solo=False).total for layers in (0, 1, 5))
    assert 0.0 <= none <= one <= five < math.inf
    assert five == pytest.approx(none + 5 * (one - none), rel=1e-6, abs=1e-6)


@given(load=LOADS, added=st.integers(1, 20))
def test_more_own_work_never_lowers_the_cost_of_a_peer(load: Load, added: int) -> None:
    node = peer("a", (0, 6), load=load)
    assert cost_of(node, own=DispatchedWork(added=added, prefill_tokens=64 * added)).total >= cost_of(node).total
