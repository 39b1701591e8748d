"""The sampler: the drawn token is a function of (seed, position, logits, parameters)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from node.engine.sampling.sampler import draw, splitmix64, uniforms
from node.requests import SamplingParams

VOCAB = 50


def some_logits(seed: int = 0, vocab: int = VOCAB) -> NDArray[np.float32]:
    return np.random.Generator(np.random.Philox(seed)).normal(0, 2, vocab).astype(np.float32)


def token(logits: NDArray[np.float32], position: int = 10, history: tuple[int, ...] = (), **params: Any) -> int:
    drawn = draw(logits, SamplingParams(**params), position, prompt_tokens=5, history=history, stop_ids=(3,)).token
    assert drawn is not None
    return drawn


def drawn_set(logits: NDArray[np.float32], **params: Any) -> set[int]:
    return {token(logits, position=position, **params) for position in range(5, 1500)}


def test_the_token_depends_on_seed_position_and_logits_alone() -> None:
    logits = some_logits()
    draws = [[token(logits, position=position, seed=seed) for position in range(5, 60)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(set(draws[0])) > 5


def test_the_noise_equals_pinned_values() -> None:
    """Two versions of the program must agree: a changed constant would change the answer at a failover."""
    assert splitmix64(1) == 0x5692161D100B05E5
    tokens = np.array([0, 1, 2047], dtype=np.int64)
    pinned = [float.fromhex(text) for text in ("0x1.6afb1d22bb3c6p-2", "0x1.c087d285ee6f6p-2", "0x1.a100a6eb1c822p-2")]
    assert uniforms(7, 0, tokens).tolist() == pinned
    assert uniforms(-1, 123456, np.array([31999])).tolist() == [float.fromhex("0x1.d84d00f51e99ep-2")]
    many = uniforms(7, 0, np.arange(100_000))
    assert many[tokens].tolist() == pinned
    assert many.min() > 0.0 and many.max() < 1.0


def test_draws_follow_the_softmax() -> None:
    logits = some_logits(3, vocab=8)
    count = 20_000
    seen = np.bincount([token(logits, position=position, seed=9) for position in range(5, 5 + count)], minlength=8)
    expected = np.exp(logits - logits.max())
    expected *= count / expected.sum()
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    assert chi_squared < 24.3  # 7 degrees of freedom, p = 0.001


def test_temperature_zero_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    logits = some_logits()
    logits[[7, 30]] = 9.0
    assert {token(logits, position=position, temperature=0.0) for position in range(5, 20)} == {7}
    assert token(logits, temperature=0.0, logprobs=0) == 7  # the path that also computes logprobs agrees


def test_top_k_keeps_k_tokens_even_if_some_are_equal() -> None:
    logits = some_logits()
    best = np.argsort(-logits, kind="stable")
    assert drawn_set(logits, top_k=3, temperature=2.0) == set(best[:3].tolist())
    logits[:] = 0.0
    assert drawn_set(logits, top_k=3) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    assert drawn_set(logits, top_p=0.75) == {0, 1}
    assert drawn_set(logits, top_p=0.85) == {0, 1, 2}
    assert drawn_set(logits, top_p=1e-9) == {0}


def test_min_p_keeps_tokens_likely_enough_relative_to_the_likeliest() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    assert drawn_set(logits, min_p=0.25) == {0, 1, 2}


def test_penalties_count_the_answer_and_repetition_penalty_also_the_prompt() -> None:
    logits = np.zeros(4, dtype=np.float32)
    logits[:3] = (1.0, 0.9, 0.8)
    history = (0, 3, 3, 3, 3, 0, 1, 1)  # five of them prompt
    assert token(logits, history=history, temperature=0.0, presence_penalty=0.15) == 0  # 0.85, 0.75, 0.8
    assert token(logits, history=history, temperature=0.0, presence_penalty=0.25) == 2  # 0.75, 0.65, 0.8
    assert token(logits, history=history, temperature=0.0, frequency_penalty=0.15) == 0  # 0.85, 0.6, 0.8
    assert token(logits, history=history[:5], temperature=0.0, frequency_penalty=2.0) == 0  # the prompt does not count
    assert token(logits, history=history[:5], temperature=0.0, repetition_penalty=1.2) == 1  # 0.83, 0.9, 0.8


def test_logit_bias_can_force_and_ban_tokens() -> None:
    logits = some_logits()
    assert token(logits, temperature=0.0, logit_bias={17: 100.0, 999: 5.0}) == 17
    assert token(logits, temperature=0.0, logit_bias={int(logits.argmax()): -math.inf}) == int(np.argsort(-logits)[1])


def test_stop_tokens_are_banned_until_min_tokens_are_drawn() -> None:
    logits = some_logits()
    logits[3] = 50.0  # the stop token
    assert token(logits, position=7, min_tokens=3, temperature=0.0) != 3
    assert token(logits, position=7, min_tokens=3) != 3
    assert token(logits, position=8, min_tokens=3, temperature=0.0) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_with_nan_or_infinity_draw_no_token(bad: float, temperature: float) -> None:
    logits = some_logits()
    logits[4] = bad
    assert draw(logits, SamplingParams(temperature=temperature), 10, 5).token is None


def test_logits_that_exclude_every_token_draw_no_token() -> None:
    logits = np.full(VOCAB, -np.inf, dtype=np.float32)
    assert draw(logits, SamplingParams(temperature=0.0), 10, 5).token is None
    banned = SamplingParams(temperature=1.0, logit_bias={number: -math.inf for number in range(VOCAB)})
    assert draw(some_logits(), banned, 10, 5).token is None


def test_logprobs_are_the_models_own_likeliest_first() -> None:
    logits = some_logits()
    drawn = draw(logits, SamplingParams(temperature=0.0, logprobs=4, logit_bias={0: 100.0}), 10, 5)
    assert drawn.token == 0
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert drawn.logprob == pytest.approx(exact[0])
    assert [other for other, _ in drawn.top] == np.argsort(-exact)[:4].tolist()
    assert [value for _, value in drawn.top] == pytest.approx(sorted(exact, reverse=True)[:4])


@settings(max_examples=60)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(5, 10**6),
    temperature=st.floats(0.0, 3.0),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_any_parameters_draw_the_same_valid_token_twice(
    seed: int, position: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    first = draw(some_logits(), params, position, 5).token
    assert first is not None and 0 <= first < VOCAB
    assert draw(some_logits().copy(), params, position, 5).token == first
