"""From logits to a token: a function of (seed, position, logits, parameters) and nothing else.

The noise is counter-based: each token's Gumbel noise is hashed from seed, position and token number, so there is no
generator whose state could differ on the node that continues. Each row is worked alone, in numpy, in float64, so no
row's result depends on its neighbours. Ties go to the lower token number.

Order: what the grammar allows, logit bias, the ban of stop tokens before `min_tokens`, penalties, temperature, top-k,
top-p, min-p, then the Gumbel-max draw (arg max of logits / temperature + noise, which draws from the softmax). Reported
logprobs are those of the model itself, before any of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from node.engine.rows import Drawn
from node.requests import SamplingParams

GREEDY_BELOW = 1e-5  # a temperature this low is greedy
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
        kept = _kept(scores / params.temperature, params)
        noise = -np.log(-np.log(uniforms(params.seed, position, kept)))
        token = int(kept[np.argmax(scores[kept] / params.temperature + noise)])
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
    weights = np.exp(scaled[kept] - scaled[kept].max())
    weights /= weights.sum()
    chosen = np.ones(len(kept), dtype=bool)
    if params.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        chosen[order] = before < params.top_p
        chosen[order[0]] = True
    if params.min_p > 0.0:
        chosen &= weights >= params.min_p * weights.max()
    return kept[chosen]


def _with_logprobs(token: int, logits: NDArray[np.float32], wanted: int | None) -> Drawn:
    if wanted is None:
        return Drawn(token)
    shifted = logits.astype(np.float64) - float(logits.max())
    logprobs = shifted - np.log(np.exp(shifted).sum())
    count = min(wanted, len(logprobs))
    best = np.argsort(-logprobs, kind="stable")[:count]
    return Drawn(token, float(logprobs[token]), tuple((int(other), float(logprobs[other])) for other in best))
