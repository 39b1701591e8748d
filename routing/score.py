"""The score of a peer for a piece of work: the expected milliseconds until the work is complete. Lower is better.

One unit for all terms makes them comparable and explainable, whereas normalised 0..1 points need weights that are hard to tune
(aibrix #814; llm-d moved the same way in 2026). Each term is a function of its own. The estimate of a stale load record drifts to
the mean of the pool, never to zero, as a peer without a recent record need not be idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from mesh.ids import ModelId, NodeId
from mesh.view import Load, Peer
from routing.dispatches import NOTHING, DispatchedWork

DEFAULT_STEP_MS_PER_LAYER = 1.0
"""Assumed of a peer that has not been measured yet; equal for all, so that layers and distance alone make a difference."""

DEFAULT_PREFILL_MS_PER_TOKEN_LAYER = 0.05
"""The same for prefill: a layer computes about twenty prompt tokens in the time of one decode step."""

DEFAULT_RESIDENCY_S = 4.0
"""How long a request stays at a peer, until this node has measured it. Also the time after which a load record is worth 1/e."""

ROWS_AT_HALF = 8.0
"""Batch size at which reading the weights and computing take equally long; a decode step takes (8 + rows) units."""

HOP_MS = 0.5
"""Cost of a hop per token beside the round trip: frame, event loop, wake-up of the engine thread. Assumed for all peers."""

UNMEASURED_RTT_MS = 1.0
UNMEASURED_FAR_RTT_MS = 60.0
"""Round trips assumed within a region and between regions until the first probe is answered."""

REGION_MS = 25.0
"""Cost of leaving the region in addition to the round trip: links between regions vary and cost money."""

SHORT_OF_MEMORY_MS = 10_000.0
"""Cost of a peer without free KV blocks, which evicts or refuses; as in Petals' sequence manager."""

NEVER_FITS_MS = 10_000_000.0
"""Cost of a peer whose whole KV cache is smaller than the request. Finite, so that sums stay comparable."""

PRIOR_FAILURES, PRIOR_OUTCOMES = 1.0, 20.0
"""Beta prior: a peer without outcomes is assumed to fail one request in twenty."""


@dataclass(frozen=True, slots=True)
class RequestWork:
    """The work of one attempt, as the entry estimates it."""

    prompt_tokens: int = 0
    output_tokens: int = 128  # expected, at most max_tokens
    kv_blocks: int = 0  # needed on each stage; 0: not estimated
    prefix_key: bytes = b""  # hash of the prompt's first blocks: its rendezvous home is a candidate; empty: no home
    cached_tokens: Mapping[NodeId, int] = field(default_factory=lambda: MappingProxyType({}))  # prompt tokens a peer holds


@dataclass(frozen=True, slots=True)
class ScoreWeights:
    """The weight of each term; with all 1 the score is an expected time."""

    queue: float = 1.0
    prefill: float = 1.0
    decode: float = 1.0
    network: float = 1.0
    redo: float = 1.0
    memory: float = 1.0
    region: float = 1.0


@dataclass(frozen=True, slots=True)
class ScoreTerms:
    """The terms of one score, each in ms and already weighted, as reported by `mesh why`."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    network: float = 0.0
    redo: float = 0.0
    memory: float = 0.0
    region: float = 0.0

    @property
    def total(self) -> float:
        return self.queue + self.prefill + self.decode + self.network + self.redo + self.memory + self.region


EVERY_TERM = ScoreWeights()


@dataclass(frozen=True, slots=True)
class PoolMeans:
    """Means over the peers that hold the model, which replace unknown and stale figures."""

    running: float = 0.0
    waiting: float = 0.0
    prefill_tokens_queued: float = 0.0
    kv_used_share: float = 0.0
    step_ms_per_layer: float = DEFAULT_STEP_MS_PER_LAYER
    prefill_ms_per_token_layer: float = DEFAULT_PREFILL_MS_PER_TOKEN_LAYER
    residency_s: float = DEFAULT_RESIDENCY_S


@dataclass(frozen=True, slots=True)
class LoadEstimate:
    """An estimate of a peer's load now: its record, drifted with age to the pool's means, and own dispatches since."""

    running: float
    waiting: float
    prefill_tokens_queued: float
    kv_blocks_free: float
    step_ms_per_layer: float
    prefill_ms_per_token_layer: float
    measured_rows: float  # batch size at which `step_ms_per_layer` was measured
    counts_only: bool  # the record counts waiting requests, but not their prompt tokens


def held_layers(peer: Peer, model: ModelId) -> int:
    """Distinct layers of `model` that the peer serves."""
    return len({layer for span in peer.facts.spans if span.model == model for layer in range(span.start, span.end)})


def step_ms_per_layer(load: Load, held: int) -> float | None:
    """Time of a peer's decode step per layer; None: not measured yet."""
    return load.step_ms / held if load.step_ms > 0.0 and held > 0 else None


def prefill_ms_per_token_layer(load: Load, held: int) -> float | None:
    """Time of a peer's prefill per prompt token and layer; None: not measured yet."""
    return 1000.0 / (load.prefill_tok_s * held) if load.prefill_tok_s > 0.0 and held > 0 else None


def pool_of(peers: Iterable[Peer], model: ModelId, residency_s: float = DEFAULT_RESIDENCY_S) -> PoolMeans:
    """The means over `peers`. Unmeasured speeds are left out; if none is measured, the defaults are used."""
    members = list(peers)
    if not members:
        return PoolMeans(residency_s=residency_s)
    loads = [peer.load for peer in members]
    held = [held_layers(peer, model) for peer in members]
    steps = [ms for load, layers in zip(loads, held) if (ms := step_ms_per_layer(load, layers)) is not None]
    prefills = [ms for load, layers in zip(loads, held) if (ms := prefill_ms_per_token_layer(load, layers)) is not None]
    shares = [load.kv_blocks_used / load.kv_blocks_total for load in loads if load.kv_blocks_total > 0]
    return PoolMeans(
        running=_mean([load.running for load in loads], 0.0),
        waiting=_mean([load.waiting for load in loads], 0.0),
        prefill_tokens_queued=_mean([load.prefill_tokens_queued for load in loads], 0.0),
        kv_used_share=_mean(shares, 0.0),
        step_ms_per_layer=_mean(steps, DEFAULT_STEP_MS_PER_LAYER),
        prefill_ms_per_token_layer=_mean(prefills, DEFAULT_PREFILL_MS_PER_TOKEN_LAYER),
        residency_s=residency_s,
    )


def trust(age_s: float, residency_s: float) -> float:
    """The weight of a load record of this age, 0..1.

    The requests that the record counted end at the rate 1/residency, so their number decays as exp(-age/residency).
    """
    return math.exp(-max(0.0, age_s) / residency_s)


def estimate(load: Load, age_s: float, held: int, pool: PoolMeans, own: DispatchedWork = NOTHING) -> LoadEstimate:
    """Estimates a peer's load now: counts drift to the pool's mean with age, own work since the record is added exactly."""
    keep = trust(age_s, pool.residency_s)

    def drifted(count: float, mean: float) -> float:
        return keep * count + (1.0 - keep) * mean

    used = drifted(load.kv_blocks_used, pool.kv_used_share * load.kv_blocks_total)
    return LoadEstimate(
        running=max(0.0, drifted(load.running, pool.running) + own.added - own.ended),
        waiting=drifted(load.waiting, pool.waiting),
        prefill_tokens_queued=drifted(load.prefill_tokens_queued, pool.prefill_tokens_queued) + own.prefill_tokens,
        kv_blocks_free=load.kv_blocks_total - used if load.kv_blocks_total > 0 else math.inf,
        step_ms_per_layer=step_ms_per_layer(load, held) or pool.step_ms_per_layer,
        prefill_ms_per_token_layer=prefill_ms_per_token_layer(load, held) or pool.prefill_ms_per_token_layer,
        measured_rows=float(load.running),
        counts_only=load.waiting > 0 and load.prefill_tokens_queued == 0,
    )


def queue_ms(now_there: LoadEstimate, held: int, own_added: int, residency_s: float) -> float:
    """Expected wait before the first own position is computed.

    Queued prompt tokens are computed at the node's prefill rate. A node that only counts waiting requests (another engine) is
    assumed to be full and to admit a request whenever a running one ends; own dispatches since its record come after those.
    """
    backlog_ms = now_there.prefill_tokens_queued * now_there.prefill_ms_per_token_layer * held
    if not now_there.counts_only:
        return backlog_ms
    leave_per_s = max(ROWS_AT_HALF, now_there.measured_rows) / residency_s
    return backlog_ms + (now_there.waiting + own_added) / leave_per_s * 1000.0


def prefill_ms(work: RequestWork, cached_tokens: int, layers: int, ms_per_token_layer: float) -> float:
    """Prefill of the part of the prompt that is not cached there, over the layers used."""
    return max(0, work.prompt_tokens - cached_tokens) * layers * ms_per_token_layer


def decode_ms(work: RequestWork, layers: int, now_there: LoadEstimate) -> float:
    """All expected decode steps at the estimated batch size: weights are read once a step, each row of the batch is computed."""
    growth = (ROWS_AT_HALF + now_there.running + 1.0) / (ROWS_AT_HALF + max(1.0, now_there.measured_rows))
    return work.output_tokens * layers * now_there.step_ms_per_layer * growth


def network_ms(rtt_ms: float, output_tokens: int, *, solo: bool) -> float:
    """Latency of the network. A node with the whole model streams its tokens back, so latencies overlap: one round trip.

    Every token passes each stage of a split path: half a round trip and a hop a step (Petals: rtt/2 + overhead).
    """
    if solo:
        return rtt_ms + HOP_MS
    return (output_tokens + 1) * (rtt_ms / 2.0 + HOP_MS)


def redo_ms(failed: float, finished: float, at_stake_ms: float) -> float:
    """Expected cost of a replay: the odds of a failure times the work that would be lost, half the decode on average."""
    failure = (PRIOR_FAILURES + failed) / (PRIOR_OUTCOMES + finished)
    return failure / (1.0 - failure) * at_stake_ms if failure < 1.0 else NEVER_FITS_MS


def memory_ms(kv_blocks_needed: int, kv_blocks_free: float, kv_blocks_total: int) -> float:
    """Cost of missing KV blocks: the missing share of `SHORT_OF_MEMORY_MS`; 0 while the request's blocks are free."""
    if kv_blocks_needed <= 0 or kv_blocks_total <= 0 or kv_blocks_needed <= kv_blocks_free:
        return 0.0
    if kv_blocks_needed > kv_blocks_total:
        return NEVER_FITS_MS
    return SHORT_OF_MEMORY_MS * (kv_blocks_needed - kv_blocks_free) / kv_blocks_needed


def region_ms(mine: str, theirs: str) -> float:
    """Cost of leaving the region; 0 within a region, or if either region has no name."""
    return REGION_MS if mine and theirs and mine != theirs else 0.0


def rtt_ms(peer: Peer, me: NodeId, my_region: str) -> float:
    """Round trip to the peer: measured, else by its network coordinate, else assumed by its region; 0 to this node itself."""
    if peer.id == me:
        return 0.0
    if peer.rtt_s is not None:
        return peer.rtt_s * 1000.0
    if peer.rtt_estimate_s is not None:
        return peer.rtt_estimate_s * 1000.0
    return UNMEASURED_FAR_RTT_MS if region_ms(my_region, peer.region) else UNMEASURED_RTT_MS


def costs(
    peer: Peer,
    layers: int,
    held: int,
    work: RequestWork,
    pool: PoolMeans,
    now: float,
    *,
    me: NodeId,
    my_region: str = "",
    own: DispatchedWork = NOTHING,
    solo: bool = True,
    weights: ScoreWeights = EVERY_TERM,
) -> ScoreTerms:
    """The terms for computing `layers` of the `held` layers of `peer`. Affine in `layers`, which `PathSearch` relies on."""
    age_s = 0.0 if peer.id == me else now - peer.load_at
    there = estimate(peer.load, age_s, held, pool, own)
    queue = queue_ms(there, held, own.added, pool.residency_s)
    prefill = prefill_ms(work, work.cached_tokens.get(peer.id, 0), layers, there.prefill_ms_per_token_layer)
    decode = decode_ms(work, layers, there)
    return ScoreTerms(
        queue=weights.queue * queue,
        prefill=weights.prefill * prefill,
        decode=weights.decode * decode,
        network=weights.network * network_ms(rtt_ms(peer, me, my_region), work.output_tokens, solo=solo),
        redo=weights.redo * redo_ms(own.failed, own.finished, queue + prefill + decode / 2.0),
        memory=weights.memory * memory_ms(work.kv_blocks, there.kv_blocks_free, peer.load.kv_blocks_total),
        region=weights.region * region_ms(my_region, peer.region),
    )


def terms(of: ScoreTerms) -> dict[str, float]:
    """The terms that are not zero by name, rounded for display."""
    named = ((term.name, round(getattr(of, term.name), 3)) for term in fields(of))
    return {name: ms for name, ms in named if ms}


def _mean(values: list[float] | list[int], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
