"""Who decodes in bench.engine: our stage, transformers' forward loop and its `generate_batch`, each in this process.

A side is started on a batch of prompts, which it reads; then it takes turns of a few greedy steps and gives what each
step took. All of them choose the next tokens by the largest logit.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bench.engine_shapes import PROMPT_TOKENS, prompts
from node.engine.model.attention import Segment
from node.engine.model.stage import Stage

PREFIX_PAGE_TOKENS = 256
TRIAL_TOKENS = 4  # of each prompt: float32 reads long ones slowly, and what is asked is how fast it decodes


@dataclass(frozen=True)
class Step:
    """One step of the whole batch."""

    wall_s: float
    cpu_s: float  # of the process that took it, all threads; NaN where nobody can tell


@dataclass(frozen=True)
class Clock:
    """By which of a step's times sides are compared."""

    name: str
    of: Callable[[Step], float]


CPU_TIME, WALL_TIME = Clock("cpu_time", lambda step: step.cpu_s), Clock("wall_time", lambda step: step.wall_s)


def judged_by(threads: int) -> Clock:
    """With one thread CPU time, which other processes hardly change; with several it would count threads that wait in a loop."""
    return CPU_TIME if threads == 1 else WALL_TIME


def faster(taken: dict[str, list[Step]], threads: int) -> str:
    """The side with the least median; empty where there is none."""
    of = judged_by(threads).of
    return min(taken, key=lambda name: statistics.median(map(of, taken[name])), default="")


class Side(Protocol):
    """One engine, started on one batch."""

    def turn(self, steps: int) -> list[Step]: ...


class Ours:
    """The stage as the engine's thread runs it; `said`: a digest of row 0's logits at each step, which no batch may change."""

    def __init__(self, stage: Stage, batch: int) -> None:
        self.stage = stage
        self.caches = [stage.sequence() for _ in range(batch)]
        self.position = PROMPT_TOKENS
        self._next: list[int] = []
        for cache, prompt in zip(self.caches, prompts(batch, stage.checkpoint.vocab_size)):
            self._next += self._forward([Segment(0, len(prompt), 0, cache)], range(len(prompt)), prompt, [len(prompt) - 1])
        self.said: list[bytes] = []

    def _forward(self, segments: list[Segment], positions: Any, ids: list[int], at: Any) -> list[int]:
        self._logits = self.stage.forward(0, self.stage.layers, segments, positions, ids=ids, logits_at=at)
        chosen: list[int] = self._logits.argmax(-1).tolist()
        return chosen

    def step(self) -> None:
        count = len(self.caches)
        segments = [Segment(row, 1, self.position, cache) for row, cache in enumerate(self.caches)]
        self._next = self._forward(segments, [self.position] * count, self._next, range(count))
        self.position += 1

    def turn(self, steps: int) -> list[Step]:
        taken = []
        for _ in range(steps):
            taken.append(timed(self.step))
            self.said.append(hashlib.blake2b(self._logits[0].numpy().tobytes(), digest_size=16).digest())
        return taken


class ForwardLoop:
    """The model's own forward with a DynamicCache and SDPA."""

    def __init__(self, model: Any, batch: int, prompt_tokens: int = PROMPT_TOKENS) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._next = torch.tensor(prompts(batch, model.config.vocab_size, prompt_tokens))
        self.step()
        self.first = self._next[:, 0].tolist()

    @torch.inference_mode()
    def step(self) -> None:
        out = self._model(self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next = out.logits[:, -1].argmax(-1, keepdim=True)
        self._next.tolist()

    def turn(self, steps: int) -> list[Step]:
        return [timed(self.step) for _ in range(steps)]


class GenerateBatch:
    """transformers' continuous batching. Each turn reads the prompts anew; only what lies between two tokens counts."""

    def __init__(self, model: Any, batch: int) -> None:
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._model = model
        self._prompts = prompts(batch, model.config.vocab_size)
        self._config = ContinuousBatchingConfig(
            page_size=PREFIX_PAGE_TOKENS,
            num_blocks=2 * batch + 2,
            max_batch_tokens=batch * PROMPT_TOKENS,
            allow_block_sharing=False,
        )

    def turn(self, steps: int) -> list[Step]:
        own = GenerationConfig(max_new_tokens=steps + 1, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = self._model.generate_batch(
            self._prompts, generation_config=own, continuous_batching_config=self._config, record_timestamps=True
        )
        made = [answer.timestamps for answer in answers.values() if answer.timestamps and len(answer.timestamps) > steps]
        if len(made) < len(self._prompts):
            raise RuntimeError(f"generate_batch answered {len(made)} of {len(self._prompts)} prompts")
        return [Step(later - earlier, float("nan")) for stamps in made for earlier, later in pairwise(stamps)]


def timed(step: Any) -> Step:
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    step()
    return Step(time.perf_counter() - began_s, time.process_time() - began_cpu_s)


def plain_model(directory: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True).eval()


def best_dtypes(directory: Path, batches: tuple[int, ...], steps: int, threads: int = 1) -> dict[int, torch.dtype]:
    """In which dtype transformers' forward is the faster one here, for each batch."""
    of = judged_by(threads).of
    best: dict[int, tuple[float, torch.dtype]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = plain_model(directory, dtype)
        for batch in batches:
            taken_s = min(map(of, ForwardLoop(model, batch, TRIAL_TOKENS).turn(steps)))
            best[batch] = min(best.get(batch, (float("inf"), dtype)), (taken_s, dtype), key=lambda pair: pair[0])
    return {batch: dtype for batch, (_, dtype) in best.items()}
