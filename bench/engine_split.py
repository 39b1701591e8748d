"""What splitting a model costs: tokens a second of two stages on this machine, loaded, against those of one.

`python -m bench.engine_split [--quick] [--threads N]`, or `measured` from `bench.engine`. A whole engine and a line of two, each
with half the layers, answer the same batch in turn, on the same cores; activations and tokens go from one engine to the
other as they do between nodes, without the network. What counts is decoding: from when all rows have begun until the first
of them ends. All tokens must be equal.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.engine_figure import run
from bench.engine_shapes import prompts
from mesh.ids import ModelId, StreamId
from node.engine.api import EngineConfig, EngineOutput, HiddenOut, OpenSequence, SequenceKey, TokenOut
from node.engine.model.checkpoint import read_checkpoint
from node.engine.worker import TorchEngine
from node.requests import SamplingParams

MODEL = ModelId("bench")
BATCH = 32
PROMPT_TOKENS = 64
ANSWER_TOKENS = 64
KV_BYTES = 1 << 29
WAIT_S = 400.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """One batch, answered. `cpu_s`: of the process, which stays comparable on a busy machine."""

    answers: dict[str, list[int]]
    tok_s: float
    tok_cpu_s: float


class Line:
    """Engines that hold a model's layers one after the other; `cuts`: where each begins but the first."""

    def __init__(self, directory: Path, threads: int, cuts: tuple[int, ...]) -> None:
        layers = read_checkpoint(directory).layers
        self._bounds = list(pairwise((0, *cuts, layers)))
        self._engines = [TorchEngine(EngineConfig(threads=threads, kv_memory_bytes=KV_BYTES)) for _ in self._bounds]
        self._news = threading.Condition()
        self._answers: dict[str, list[int]] = {}
        self._finished = 0
        self._lost: EngineOutput | None = None
        for number, (engine, (start, end)) in enumerate(zip(self._engines, self._bounds)):
            engine.load(directory, MODEL, start, end)
            engine.start(partial(self._carry, number))

    def _carry(self, number: int, outputs: list[EngineOutput]) -> None:
        """As `node.serving.stages` does: what a step gives goes on together."""
        hidden = [out for out in outputs if isinstance(out, HiddenOut)]
        tokens = [out for out in outputs if isinstance(out, TokenOut)]
        if hidden:
            self._engines[number + 1].push(*hidden)
        if tokens and number:
            self._engines[0].token(*(out for out in tokens if out.finish is None))
        with self._news:
            for out in tokens:
                self._answers[out.key.stream].append(out.token)
                self._finished += out.finish is not None
            self._lost = next((out for out in outputs if not isinstance(out, HiddenOut | TokenOut)), self._lost)
            self._news.notify_all()

    def answer(self, batch: Sequence[Sequence[int]], answer_tokens: int, name: str) -> Loaded:
        """Raises RuntimeError: a sequence was lost, or nothing came in time."""
        self._answers, self._finished = {f"{name}-{number}": [] for number in range(len(batch))}, 0
        answers = self._answers
        sampling = SamplingParams(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True)
        for stream, prompt in zip(answers, batch):
            for engine, (start, end) in reversed(list(zip(self._engines, self._bounds))):
                size, tokens = len(prompt), tuple(prompt)
                engine.open(OpenSequence(StreamId(stream), 0, 1, MODEL, start, end, size, size, tokens, sampling))
        self._until(lambda: all(answers.values()))
        began_s, began_cpu_s, before = time.perf_counter(), time.process_time(), sum(map(len, answers.values()))
        self._until(lambda: self._finished > 0)
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        said = sum(map(len, answers.values())) - before
        self._until(lambda: self._finished == len(batch))
        for stream in answers:
            for engine in self._engines:
                engine.close(SequenceKey(StreamId(stream), 0, 1))
        return Loaded(dict(answers), said / took_s, said / cpu_s)

    def _until(self, reached: Any) -> None:
        with self._news:
            if not self._news.wait_for(lambda: self._lost is not None or reached(), WAIT_S) or self._lost is not None:
                raise RuntimeError(f"a line of {len(self._engines)} engines came to a stop: {self._lost}")

    def stop(self) -> None:
        for engine in self._engines:
            engine.stop()


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """All threads that begin within keep to as many cores: two engines must not have twice what one has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measured(directory: Path, threads: int, rounds: int) -> dict[str, Any]:
    """`split2_ratio`: median over median of tokens a second; of tokens a second of CPU time beside it, for busy machines."""
    checkpoint = read_checkpoint(directory)
    batch = prompts(BATCH, checkpoint.vocab_size, PROMPT_TOKENS)
    with on_cores(threads):
        lines = {"one": Line(directory, threads, ()), "two": Line(directory, threads, (checkpoint.layers // 2,))}
        taken: dict[str, list[Loaded]] = {name: [] for name in lines}
        try:
            for number in range(rounds + 1):
                for name, line in lines.items():
                    taken[name].append(line.answer(batch, ANSWER_TOKENS, f"r{number}"))
        finally:
            for line in lines.values():
                line.stop()
    counted = {name: each[1:] for name, each in taken.items()}  # the first is for the second engine to find its groups
    tok_s = {name: statistics.median(each.tok_s for each in some) for name, some in counted.items()}
    cpu = {name: statistics.median(each.tok_cpu_s for each in some) for name, some in counted.items()}
    return {
        "split2_ratio": round(tok_s["two"] / tok_s["one"], 3),
        "split2_ratio_cpu_time": round(cpu["two"] / cpu["one"], 3),
        "batch": BATCH,
        "answer_tokens": ANSWER_TOKENS,
        "rounds": rounds,
        "tok_s": {name: round(each, 1) for name, each in tok_s.items()},
        "exact": all(one.answers == two.answers for one, two in zip(taken["one"], taken["two"])),
    }


if __name__ == "__main__":
    run("engine_split", measured, rounds=3, quick_rounds=3)
