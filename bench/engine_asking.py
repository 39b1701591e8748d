"""One engine as a node runs it, asked one thing at a time: how long until the first token, how long for all."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from mesh.ids import ModelId, StreamId
from mesh.prefix import further_names
from node.engine.api import EngineConfig, EngineOutput, OpenSequence, Prefix, TokenOut
from node.engine.model.checkpoint import read_checkpoint
from node.engine.worker import TorchEngine
from node.requests import SamplingParams

MODEL = ModelId("bench")
SALT = b"bench"
WAIT_S = 300.0  # for one token, on a machine that does much else


@dataclass(frozen=True, slots=True)
class Answer:
    """`cpu_s`: of the whole process, which stays comparable on a busy machine."""

    tokens: tuple[int, ...]
    ttft_s: float
    took_s: float
    cpu_s: float
    cached: int


class Asking:
    def __init__(self, engine: TorchEngine, layers: int, numerics: str) -> None:
        self.engine = engine
        self._layers = layers
        self._numerics = numerics
        self._names = count()
        self._outputs: queue.Queue[EngineOutput] = queue.Queue()
        engine.start(self._take)

    def _take(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            self._outputs.put(output)

    def ask(self, prompt: Sequence[int], answer_tokens: int, temperature: float = 0.0) -> Answer:
        """Pages of earlier prompts are used, as they are in a node.

        Raises:
            RuntimeError: the engine gave the sequence up.
        """
        sequence = OpenSequence(
            stream=StreamId(f"s{next(self._names)}"),
            choice=0,
            attempt=1,
            model=MODEL,
            start=0,
            end=self._layers,
            prompt_tokens=len(prompt),
            known=len(prompt),
            tokens=tuple(prompt),
            sampling=SamplingParams(temperature=temperature, seed=1, max_tokens=answer_tokens),
            prefix=Prefix(SALT, tuple(further_names(SALT, [], prompt)), self._numerics),
        )
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        self.engine.open(sequence)
        tokens: list[int] = []
        ttft_s = 0.0
        while True:
            out = self._outputs.get(timeout=WAIT_S)
            if not isinstance(out, TokenOut):
                raise RuntimeError(f"the engine gave up: {out}")
            ttft_s = ttft_s or time.perf_counter() - began_s
            tokens.append(out.token)
            if out.finish is not None:
                took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
                return Answer(tuple(tokens), ttft_s, took_s, cpu_s, out.cached)


@contextmanager
def asking(directory: Path, threads: int, kv_memory_bytes: int) -> Iterator[Asking]:
    """The whole model in `directory`, loaded as a node would load it."""
    checkpoint = read_checkpoint(directory)
    engine = TorchEngine(EngineConfig(threads=threads, kv_memory_bytes=kv_memory_bytes))
    card = engine.load(directory, MODEL, 0, checkpoint.layers)
    try:
        yield Asking(engine, checkpoint.layers, card.numerics)
    finally:
        engine.stop()
