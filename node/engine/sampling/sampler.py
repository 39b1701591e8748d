"""From logits to a token: a function of (seed, position, logits, parameters) and nothing else.

The noise is counter-based: each token's Gumbel noise is hashed from seed, position and token number, so there is no
generator whose state could differ on the node that continues. Each row is worked alone, in numpy, so no row's result depends
on its neighbours; what decides is computed by `node.engine.native.portable` and summed in whole numbers, so none depends on the
machine. Ties go to the lower token number.

Order: what the grammar allows, logit bias, the ban of stop tokens before `min_tokens`, penalties, temperature, top-k,
top-p, min-p, then the Gumbel-max draw (arg max of logits / temperature + noise, which draws from the softmax). Reported
logprobs are those of the model itself, before any of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from node.engine.native import portable
from node.engine.scheduling.step_plan import Drawn
from node.requests import SamplingParams

GREEDY_BELOW = 1e-5  # a temperature this low is greedy
NEAR = 1e-6  # of scores with noise: far more than two machines' logarithms differ by
WEIGHT_UNITS = 2.0**44  # 2**18 tokens of the largest weight fit 63 bits
NUCLEUS_TRIAL = 256  # tokens sorted at first
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mixed(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit integers that leaves no pattern."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def uniforms(seed: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number strictly inside (0, 1) for each token: the SplitMix64 stream of (seed, position), at index `token`."""
    start = mixed(mixed(seed + GOLDEN) ^ mixed((position + 1) * GOLDEN))
    with np.errstate(over="ignore"):
        state = np.uint64(start) + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def draw(
    logits: NDArray[np.float32],
    params: SamplingParams,
    position: int,
    prompt_tokens: int,
    history: Sequence[int] = (),
    stop_ids: Collection[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> Drawn:
    """The token for `position`. `logits` `[vocab]`; `history` are all tokens before, needed for penalties only.

    `allowed` `[vocab]`: the tokens that a grammar lets through, at least one; where all of them are stop tokens, the least
    number of tokens is forgone.

    Logits that hold a NaN or plus infinity, or leave nothing to draw, give a `Drawn` without a token.
    """
    if _plainly_greedy(params, position - prompt_tokens):
        worst = int(logits.argmax())  # a NaN counts as the greatest
        token = worst if allowed is None else int(np.where(allowed, logits, -np.inf).argmax())
        return Drawn(token if np.isfinite(logits[worst]) and np.isfinite(logits[token]) else None)
    if np.isnan(logits).any() or logits.max() == np.inf or logits.max() == -np.inf:
        return Drawn(None)
    banned = stop_ids if position - prompt_tokens < params.min_tokens else ()
    if allowed is not None:
        logits_allowed = np.where(allowed, logits, np.float32(-np.inf))
        if int(allowed.sum()) == sum(bool(allowed[token]) for token in banned if token < len(allowed)):
            banned = ()
    else:
        logits_allowed = logits
    scores = _adjusted(logits_allowed, params, prompt_tokens, history, banned)
    if params.temperature < GREEDY_BELOW:
        token = int(scores.argmax())
    else:
        scaled = scores / params.temperature
        token = _drawn_from(_kept(scaled, params), scaled, params.seed, position)
    if scores[token] == -np.inf:
        return Drawn(None)
    return _with_logprobs(token, logits, params.logprobs)


def _plainly_greedy(params: SamplingParams, drawn: int) -> bool:
    """Whether the arg max of the bare logits is all that is asked; one pass over them instead of five."""
    return (
        params.temperature < GREEDY_BELOW
        and not params.logit_bias
        and drawn >= params.min_tokens
        and params.repetition_penalty == 1.0
        and not (params.presence_penalty or params.frequency_penalty)
        and params.logprobs is None
    )


def _adjusted(
    logits: NDArray[np.float32], params: SamplingParams, prompt_tokens: int, history: Sequence[int], banned: Collection[int]
) -> NDArray[np.float64]:
    scores = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        if 0 <= token < len(scores):
            scores[token] += bias
    for token in banned:
        if 0 <= token < len(scores):
            scores[token] = -np.inf
    if params.repetition_penalty != 1.0 and history:
        seen = np.unique(np.asarray(history, dtype=np.int64))
        scores[seen] = np.where(
            scores[seen] > 0, scores[seen] / params.repetition_penalty, scores[seen] * params.repetition_penalty
        )
    if (params.presence_penalty or params.frequency_penalty) and len(history) > prompt_tokens:
        seen, counts = np.unique(np.asarray(history[prompt_tokens:], dtype=np.int64), return_counts=True)
        scores[seen] -= params.presence_penalty + params.frequency_penalty * counts
    return scores


def _drawn_from(kept: NDArray[np.int64], scaled: NDArray[np.float64], seed: int, position: int) -> int:
    """The arg max of scores and Gumbel noise. numpy's own logarithm, whose last bits differ by machine, only narrows it down."""
    numbers = uniforms(seed, position, kept)
    about = scaled[kept] - np.log(-np.log(numbers))
    near = np.flatnonzero(about >= about.max() - NEAR)
    exact = scaled[kept[near]] - portable.log(-portable.log(numbers[near]))
    return int(kept[near[np.argmax(exact)]])


def _weights(scaled: NDArray[np.float64]) -> NDArray[np.int64]:
    """The softmax's numerators as multiples of 2**-44: sums of them do not depend on their order."""
    relative: NDArray[np.float32] = (scaled - scaled.max()).astype(np.float32)
    return (portable.exp32(relative).astype(np.float64) * WEIGHT_UNITS).astype(np.int64)


def _kept(scaled: NDArray[np.float64], params: SamplingParams) -> NDArray[np.int64]:
    """The tokens that may be drawn, by number. The likeliest is always among them."""
    kept = np.flatnonzero(scaled > -np.inf)
    if not len(kept):
        return np.zeros(1, dtype=np.int64)
    if 0 < params.top_k < len(kept):
        floor = np.partition(scaled[kept], -params.top_k)[-params.top_k]
        above, level = kept[scaled[kept] > floor], kept[scaled[kept] == floor]
        kept = np.sort(np.concatenate([above, level[: params.top_k - len(above)]]))
    if params.top_p >= 1.0 and params.min_p <= 0.0:
        return kept
    scores = scaled[kept]
    weights = _weights(scores)
    chosen = np.ones(len(kept), dtype=bool)
    if params.top_p < 1.0:
        chosen[:] = False
        chosen[_nucleus(scores, weights, params.top_p)] = True
    if params.min_p > 0.0:
        chosen &= weights >= params.min_p * float(weights.max())
    return kept[chosen]


def _nucleus(scores: NDArray[np.float64], weights: NDArray[np.int64], top_p: float) -> NDArray[np.int64]:
    """Indices of the likeliest that together reach `top_p` of all weight, equal ones by their number.

    Few do as a rule, so the best hundreds are sorted first, and more only if those do not reach.
    """
    wanted = top_p * float(weights.sum())
    count = NUCLEUS_TRIAL
    while True:
        floor = -np.inf if count >= len(scores) else np.partition(scores, -count)[-count]
        best = np.flatnonzero(scores > floor) if count < len(scores) else np.arange(len(scores))
        order = best[np.argsort(-scores[best], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        within = before < wanted
        if count >= len(scores) or (len(order) and not within[-1]):
            within[0] = True
            return order[within]
        count *= 16


def _with_logprobs(token: int, logits: NDArray[np.float32], wanted: int | None) -> Drawn:
    if wanted is None:
        return Drawn(token)
    scores = logits.astype(np.float64)
    total = float(_weights(scores).sum()) / WEIGHT_UNITS
    level = float(scores.max()) + float(portable.log(np.array([total]))[0])
    count = min(wanted, len(scores))
    floor = np.partition(scores, -count)[-count] if count else np.inf
    best = np.flatnonzero(scores >= floor)
    best = best[np.argsort(-scores[best], kind="stable")][:count]
    return Drawn(token, float(scores[token]) - level, tuple((int(other), float(scores[other]) - level) for other in best))
