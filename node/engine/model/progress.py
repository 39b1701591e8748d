"""The progress of a span's load: its phase, layers, bytes and seconds.

transformers reads a checkpoint in one call of seconds to minutes and shows its progress only by a progress bar around its
loop over the tensors. A hook replaces this bar, for the thread that loads.
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

REPORT_INTERVAL_S = 2.0
READING_BAR = "Loading weights"  # transformers' name of the bar over the tensors
_LAYER = re.compile(r"\.(\d+)\.")

log = structlog.get_logger()


class LoadPhase(Enum):
    READING = "reading"
    PACKING = "packing"
    CHECKING = "checking"


PHASE_START = {LoadPhase.READING: 0.0, LoadPhase.PACKING: 0.15, LoadPhase.CHECKING: 0.75}
"""The share of a load at which each phase begins, roughly: with 155 million parameters they took 11, 64 and 25 % of the time."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """The state of a load. `layers_done`: in this phase; `bytes_done`: of the tensors read, in the dtype of the computation."""

    phase: LoadPhase
    layers_done: int
    layers: int
    bytes_done: int
    bytes: int
    seconds: float  # since the load began

    @property
    def share(self) -> float:
        """An estimate of the share of the whole load that is done, from 0 to 1."""
        match self.phase:
            case LoadPhase.READING:
                return PHASE_START[LoadPhase.PACKING] * (self.bytes_done / self.bytes if self.bytes else 0.0)
            case LoadPhase.PACKING:
                begin = PHASE_START[LoadPhase.PACKING]
                return begin + (PHASE_START[LoadPhase.CHECKING] - begin) * (self.layers_done / max(self.layers, 1))
        return PHASE_START[LoadPhase.CHECKING]


class LoadTracker:
    """Follows one load. When a kernel fails its check, the next one begins again: the counts restart, the seconds do not.

    The thread that loads calls its methods; any thread may read `now`.
    """

    def __init__(
        self,
        layers: int,
        report: Callable[[LoadProgress], None] = lambda progress: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`report` is called at the beginning of each phase, and later at most once in `REPORT_INTERVAL_S`."""
        self._report = report
        self._clock = clock
        self._began_s = self._reported_s = clock()
        self._sizes: Mapping[str, int] = {}
        self._missing: Counter[str] = Counter()  # tensors yet to come, by layer
        self._done = LoadProgress(LoadPhase.READING, 0, layers, 0, 0, 0.0)

    @property
    def now(self) -> LoadProgress:
        """The progress, with the seconds up to this call."""
        done = self._done
        return LoadProgress(done.phase, done.layers_done, done.layers, done.bytes_done, done.bytes, self._elapsed_s())

    def start_reading(self, sizes: Mapping[str, int]) -> None:
        """Begins the reading phase. `sizes`: bytes of each tensor that will be read, by name."""
        self._sizes = sizes
        self._missing = Counter(_layer_of(name) for name in sizes)
        self._set(LoadPhase.READING, 0, 0, sum(sizes.values()))

    def tensor_read(self, name: str) -> None:
        """Counts a tensor that has been read; names that `start_reading` did not list count for nothing."""
        done = self._done
        layer = _layer_of(name)
        self._missing[layer] -= name in self._sizes
        ended = bool(layer) and name in self._sizes and self._missing[layer] == 0
        self._set(done.phase, done.layers_done + ended, done.bytes_done + self._sizes.get(name, 0), done.bytes)

    def start_packing(self) -> None:
        """Begins the packing phase."""
        self._set(LoadPhase.PACKING, 0, self._done.bytes, self._done.bytes)

    def layer_packed(self) -> None:
        """Counts one more packed layer."""
        done = self._done
        self._set(done.phase, done.layers_done + 1, done.bytes_done, done.bytes)

    def start_checking(self) -> None:
        """Begins the self-check."""
        self._set(LoadPhase.CHECKING, self._done.layers, self._done.bytes, self._done.bytes)

    def _set(self, phase: LoadPhase, layers_done: int, bytes_done: int, bytes: int) -> None:
        elapsed_s = self._elapsed_s()
        begins = phase is not self._done.phase or bytes_done == layers_done == 0
        self._done = LoadProgress(phase, layers_done, self._done.layers, bytes_done, bytes, elapsed_s)
        if begins or elapsed_s + self._began_s - self._reported_s >= REPORT_INTERVAL_S:
            self._reported_s = elapsed_s + self._began_s
            self._report(self._done)

    def _elapsed_s(self) -> float:
        return self._clock() - self._began_s

    def __enter__(self) -> LoadTracker:
        """Counts tensors that transformers reads in this thread, until `__exit__`."""
        _thread.tracker = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.tracker = None


def _layer_of(name: str) -> str:
    found = _LAYER.search(name)
    return found[1] if found else ""


_thread = threading.local()


def _reporting(items: Iterable[tuple[str, object]], tracker: LoadTracker) -> Iterator[tuple[str, object]]:
    for name, target in items:
        yield name, target
        tracker.tensor_read(name)


def _progress_bar(factory: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, object]) -> object:
    tracker: LoadTracker | None = getattr(_thread, "tracker", None)
    if tracker is None or kwargs.get("desc") != READING_BAR:
        return factory(*args, **kwargs)
    return _reporting(args[0], tracker)


transformers_logging.set_tqdm_hook(_progress_bar)


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
