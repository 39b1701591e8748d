"""How far a span has come while it loads: what is being done, layers, bytes, seconds.

transformers reads a checkpoint in one call of seconds to minutes; the one place where it shows its progress is the progress bar
around its loop over the tensors. We put ourselves in the bar's place, for the thread that loads.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import structlog
from transformers.utils import logging as transformers_logging

from mesh.view import Span

TELL_EVERY_S = 2.0
READING_BAR = "Loading weights"  # what transformers calls the bar over the tensors
_LAYER = re.compile(r"\.(\d+)\.")

log = structlog.get_logger()


class LoadPhase(Enum):
    READING = "reading"
    PACKING = "packing"
    CHECKING = "checking"


BEGINS_AT = {LoadPhase.READING: 0.0, LoadPhase.PACKING: 0.15, LoadPhase.CHECKING: 0.75}
"""Where in a load each phase begins, roughly: of a model of 155 million parameters they took 11, 64 and 25 % of the time."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """`layers_done` of the phase; `bytes_done` of what is read, in the dtype that it is computed in."""

    phase: LoadPhase
    layers_done: int
    layers: int
    bytes_done: int
    bytes: int
    seconds: float  # since the load began

    @property
    def share(self) -> float:
        """The share of the whole load that is done, from 0 to 1: an estimate."""
        match self.phase:
            case LoadPhase.READING:
                return BEGINS_AT[LoadPhase.PACKING] * (self.bytes_done / self.bytes if self.bytes else 0.0)
            case LoadPhase.PACKING:
                begin = BEGINS_AT[LoadPhase.PACKING]
                return begin + (BEGINS_AT[LoadPhase.CHECKING] - begin) * (self.layers_done / max(self.layers, 1))
        return BEGINS_AT[LoadPhase.CHECKING]


class LoadTracker:
    """One load. A kernel that fails its check begins it anew: the counts do too, the seconds do not.

    Written by the thread that loads; `now` may be read by any.
    """

    def __init__(
        self,
        layers: int,
        tell: Callable[[LoadProgress], None] = lambda progress: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`tell` is called at the beginning of each phase and every `TELL_EVERY_S`."""
        self._tell = tell
        self._clock = clock
        self._began_s = self._told_s = clock()
        self._sizes: Mapping[str, int] = {}
        self._missing: Counter[str] = Counter()  # tensors yet to come, by layer
        self._done = LoadProgress(LoadPhase.READING, 0, layers, 0, 0, 0.0)

    @property
    def now(self) -> LoadProgress:
        done = self._done
        return LoadProgress(done.phase, done.layers_done, done.layers, done.bytes_done, done.bytes, self._elapsed_s())

    def begins(self, sizes: Mapping[str, int]) -> None:
        """`sizes`: bytes of each tensor that will be read, by name."""
        self._sizes = sizes
        self._missing = Counter(_layer_of(name) for name in sizes)
        self._set(LoadPhase.READING, 0, 0, sum(sizes.values()))

    def read(self, name: str) -> None:
        done = self._done
        layer = _layer_of(name)
        self._missing[layer] -= name in self._sizes
        ended = bool(layer) and name in self._sizes and self._missing[layer] == 0
        self._set(done.phase, done.layers_done + ended, done.bytes_done + self._sizes.get(name, 0), done.bytes)

    def packs(self) -> None:
        self._set(LoadPhase.PACKING, 0, self._done.bytes, self._done.bytes)

    def packed(self) -> None:
        """One more layer."""
        done = self._done
        self._set(done.phase, done.layers_done + 1, done.bytes_done, done.bytes)

    def checks(self) -> None:
        self._set(LoadPhase.CHECKING, self._done.layers, self._done.bytes, self._done.bytes)

    def _set(self, phase: LoadPhase, layers_done: int, bytes_done: int, bytes: int) -> None:
        elapsed_s = self._elapsed_s()
        begins = phase is not self._done.phase or bytes_done == layers_done == 0
        self._done = LoadProgress(phase, layers_done, self._done.layers, bytes_done, bytes, elapsed_s)
        if begins or elapsed_s + self._began_s - self._told_s >= TELL_EVERY_S:
            self._told_s = elapsed_s + self._began_s
            self._tell(self._done)

    def _elapsed_s(self) -> float:
        return self._clock() - self._began_s

    def __enter__(self) -> LoadTracker:
        """What transformers reads in this thread is this load's."""
        _thread.watch = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.watch = None


def _layer_of(name: str) -> str:
    found = _LAYER.search(name)
    return found[1] if found else ""


_thread = threading.local()


def _followed(items: Iterable[tuple[str, object]], watch: LoadTracker) -> Iterator[tuple[str, object]]:
    for name, way in items:
        yield name, way
        watch.read(name)


def _bar(factory: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, object]) -> object:
    watch: LoadTracker | None = getattr(_thread, "watch", None)
    if watch is None or kwargs.get("desc") != READING_BAR:
        return factory(*args, **kwargs)
    return _followed(args[0], watch)


transformers_logging.set_tqdm_hook(_bar)


def log_progress(span: Span, progress: LoadProgress) -> None:
    log.info(
        "span loading",
        model=span.model,
        start=span.start,
        end=span.end,
        phase=progress.phase.value,
        layers=f"{progress.layers_done}/{progress.layers}",
        read=f"{gib(progress.bytes_done)} of {gib(progress.bytes)}",
        seconds=round(progress.seconds, 1),
    )


def gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.2f} GiB"
