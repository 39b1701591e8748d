"""What drawing a token costs, in CPU time of one row, with a vocabulary of 128,256."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy

from node.engine.sampling.sampler import draw
from node.requests import SamplingParams

VOCABULARY = 128_256
SPREAD = 2.5  # standard deviation of the logits: some thousand tokens make up 90 %
CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "greedy, 5 logprobs": SamplingParams(temperature=0.0, logprobs=5),
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 0.7, top_p 0.9": SamplingParams(temperature=0.7, top_p=0.9),
    "temperature 1, top_k 20": SamplingParams(temperature=1.0, top_k=20),
    "temperature 1, top_k 20, top_p 0.95": SamplingParams(temperature=1.0, top_k=20, top_p=0.95),
}


def measured(rounds: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """`sampler`: median CPU milliseconds of one draw, by what is asked for; cases take turns."""
    numbers = numpy.random.default_rng(11)
    taken_s: dict[str, list[float]] = {name: [] for name in CASES}
    for position in range(rounds + 1):
        logits = numbers.normal(scale=SPREAD, size=vocabulary).astype(numpy.float32)
        for name, params in CASES.items():
            began_s = time.thread_time()
            drawn = draw(logits, params, position, prompt_tokens=0)
            took_s = time.thread_time() - began_s
            if drawn.token is None:
                raise RuntimeError(f"{name}: no token was drawn")
            if position:
                taken_s[name].append(took_s)
    cpu_ms = {name: round(1e3 * statistics.median(each), 2) for name, each in taken_s.items()}
    return {"sampler": {"vocabulary": vocabulary, "cpu_ms": cpu_ms, "draws": rounds}}
