"""Draws a token from logits: a function of (seed, position, logits, parameters) and nothing else.

The noise is counter-based: the Gumbel noise of each token is hashed from seed, position and token number, so there is no
generator whose state could differ on the node that continues a sequence. Each row is processed alone, in numpy, so no result
depends on the other rows of a step; every comparison that decides is computed by `node.engine.native.portable` or summed in whole
numbers, so no result depends on the machine. Of equal scores the lower token number wins.

Order: the tokens that the grammar allows, logit bias, the ban of stop tokens before `min_tokens`, penalties, temperature, top-k,
top-p, min-p, then the Gumbel-max draw (arg max of logits / temperature + noise, which draws from the softmax). Reported
logprobs are those of the model itself, before any of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from node.engine.native import portable
from node.engine.scheduling.sequence import DrawResult
from node.requests import SamplingParams

MIN_TEMPERATURE = 1e-5  # below it sampling is greedy
LOG_TOLERANCE = 1e-6  # far above the difference between the logarithms of two machines
WEIGHT_UNITS = 2.0**44  # 2**18 tokens of the largest weight fit 63 bits
FIRST_SORTED = 256  # tokens
MASK_64 = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(value: int) -> int:
    """Returns the finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that removes patterns."""
    value &= MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def uniforms(seed: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns a number strictly inside (0, 1) for each token: the SplitMix64 stream of (seed, position) at index `token`."""
    start = splitmix64(splitmix64(seed + GOLDEN_GAMMA) ^ splitmix64((position + 1) * GOLDEN_GAMMA))
    with np.errstate(over="ignore"):
        state = np.uint64(start) + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN_GAMMA)
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
) -> DrawResult:
    """Draws the token for `position`. `logits`: `[vocab]`; `history`: all tokens before, needed for penalties only.

    `allowed`: `[vocab]`, the tokens that a grammar allows, at least one; where all of them are stop tokens, `min_tokens` is
    ignored.

    Logits that hold a NaN or plus infinity, or leave nothing to draw, give a result without a token.
    """
    if _is_plain_greedy(params, position - prompt_tokens):
        greatest = int(logits.argmax())  # a NaN counts as the greatest
        token = greatest if allowed is None else int(np.where(allowed, logits, -np.inf).argmax())
        return DrawResult(token if np.isfinite(logits[greatest]) and np.isfinite(logits[token]) else None)
    if np.isnan(logits).any() or logits.max() == np.inf or logits.max() == -np.inf:
        return DrawResult(None)
    banned = stop_ids if position - prompt_tokens < params.min_tokens else ()
    if allowed is not None:
        logits_allowed = np.where(allowed, logits, np.float32(-np.inf))
        if int(allowed.sum()) == sum(bool(allowed[token]) for token in banned if token < len(allowed)):
            banned = ()
    else:
        logits_allowed = logits
    assert allowed is None or bool(allowed.any())
    scores = _adjusted_scores(logits_allowed, params, prompt_tokens, history, banned)
    if params.temperature < MIN_TEMPERATURE:
        token = int(scores.argmax())
    else:
        scaled = scores / params.temperature
        token = _gumbel_argmax(_candidates(scaled, params), scaled, params.seed, position)
    if scores[token] == -np.inf:
        return DrawResult(None)
    return _with_logprobs(token, logits, params.logprobs)


def _is_plain_greedy(params: SamplingParams, answer_tokens: int) -> bool:
    """Returns whether the result is the arg max of the unchanged logits, which takes one pass over them instead of five."""
    return (
        params.temperature < MIN_TEMPERATURE
        and not params.logit_bias
        and answer_tokens >= params.min_tokens
        and params.repetition_penalty == 1.0
        and not (params.presence_penalty or params.frequency_penalty)
        and params.logprobs is None
    )


def _adjusted_scores(
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


def _gumbel_argmax(candidates: NDArray[np.int64], scaled: NDArray[np.float64], seed: int, position: int) -> int:
    """Returns the arg max of scores plus Gumbel noise. numpy's logarithm, whose last bits differ by machine, only preselects."""
    numbers = uniforms(seed, position, candidates)
    approximate = scaled[candidates] - np.log(-np.log(numbers))
    near = np.flatnonzero(approximate >= approximate.max() - LOG_TOLERANCE)
    exact = scaled[candidates[near]] - portable.log(-portable.log(numbers[near]))
    return int(candidates[near[np.argmax(exact)]])


def _integer_weights(scaled: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the numerators of the softmax as multiples of 2**-44: their sums do not depend on the order of summation."""
    relative: NDArray[np.float32] = (scaled - scaled.max()).astype(np.float32)
    return (portable.exp32(relative).astype(np.float64) * WEIGHT_UNITS).astype(np.int64)


def _candidates(scaled: NDArray[np.float64], params: SamplingParams) -> NDArray[np.int64]:
    """Returns the tokens that top-k, top-p and min-p leave, in ascending order; the likeliest is always among them."""
    kept = np.flatnonzero(scaled > -np.inf)
    if not len(kept):
        return np.zeros(1, dtype=np.int64)
    if 0 < params.top_k < len(kept):
        floor = np.partition(scaled[kept], -params.top_k)[-params.top_k]
        above, level = kept[scaled[kept] > floor], kept[scaled[kept] == floor]
        # Of the tokens at the floor the lowest numbers fill the places that are left.
        kept = np.sort(np.concatenate([above, level[: params.top_k - len(above)]]))
    if params.top_p >= 1.0 and params.min_p <= 0.0:
        return kept
    scores = scaled[kept]
    weights = _integer_weights(scores)
    chosen = np.ones(len(kept), dtype=bool)
    if params.top_p < 1.0:
        chosen[:] = False
        chosen[_nucleus(scores, weights, params.top_p)] = True
    if params.min_p > 0.0:
        chosen &= weights >= params.min_p * float(weights.max())
    return kept[chosen]


def _nucleus(scores: NDArray[np.float64], weights: NDArray[np.int64], top_p: float) -> NDArray[np.int64]:
    """Returns the indices of the likeliest tokens that together reach `top_p` of all weight; of equal ones the lower first.

    A few tokens usually suffice, so the best `FIRST_SORTED` are sorted first, and more only if their weight is too small.
    """
    wanted_weight = top_p * float(weights.sum())
    count = FIRST_SORTED
    while True:
        floor = -np.inf if count >= len(scores) else np.partition(scores, -count)[-count]
        best = np.flatnonzero(scores > floor) if count < len(scores) else np.arange(len(scores))
        order = best[np.argsort(-scores[best], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        within = before < wanted_weight
        if count >= len(scores) or (len(order) and not within[-1]):
            within[0] = True  # however small `top_p` is
            return order[within]
        count *= 16


def _with_logprobs(token: int, logits: NDArray[np.float32], top_count: int | None) -> DrawResult:
    if top_count is None:
        return DrawResult(token)
    scores = logits.astype(np.float64)
    total = float(_integer_weights(scores).sum()) / WEIGHT_UNITS
    log_sum = float(scores.max()) + float(portable.log(np.array([total]))[0])
    count = min(top_count, len(scores))
    floor = np.partition(scores, -count)[-count] if count else np.inf
    best = np.flatnonzero(scores >= floor)
    best = best[np.argsort(-scores[best], kind="stable")][:count]
    return DrawResult(
        token, float(scores[token]) - log_sum, tuple((int(other), float(scores[other]) - log_sum) for other in best)
    )
