"""Batches in their order from processes of their own, a few ahead of the training."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from tools.default_model.examples import Batch, Maker

_maker: list[Maker] = []  # of this process


def _prepare(work: Path, seed: int) -> None:
    _maker.append(Maker.load(work, seed))


def _make(number: int, stage: int, tokens: int) -> tuple[int, Batch]:
    return stage, _maker[0].batch(number, stage, tokens)


def batches(
    work: Path, seed: int, first: int, tokens: int, stage_of: Callable[[int], int], workers: int
) -> Iterator[tuple[int, Batch]]:
    """Batch `first` and all after it, each with its stage, without end. `workers` 0: made in this process.

    `stage_of(number)` is asked when a batch is begun, some batches ahead of its use.
    """
    if not workers:
        maker = Maker.load(work, seed)
        while True:
            stage = stage_of(first)
            yield stage, maker.batch(first, stage, tokens)
            first += 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(work, seed)) as pool:
        ahead: deque[Future[tuple[int, Batch]]] = deque()
        try:
            while True:
                while len(ahead) < 2 * workers + 2:
                    ahead.append(pool.submit(_make, first, stage_of(first), tokens))
                    first += 1
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
