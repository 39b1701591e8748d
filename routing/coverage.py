"""How well each version of a model is covered: how many live peers hold each layer, and how many of them take new work.

Pure functions of one view, and of the change between two. A change is reported when a layer comes down to its last ready copy,
loses that copy, or gets a second one back; not for every copy more or less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from mesh.ids import ModelId
from mesh.versions import versions
from mesh.view import ModelCard, View
from routing.holders import SpanHolder, holders


@dataclass(frozen=True, slots=True)
class CoverageRun:
    """Consecutive layers `[start, end)` with equally many copies."""

    start: int
    end: int
    live: int  # holders that are alive or suspect, and not draining
    ready: int  # those of them that may be given new work


@dataclass(frozen=True, slots=True)
class Coverage:
    """The coverage of one version; the runs are in order and cover all layers."""

    runs: tuple[CoverageRun, ...]

    @property
    def least_live(self) -> int:
        return min((run.live for run in self.runs), default=0)

    @property
    def least_ready(self) -> int:
        return min((run.ready for run in self.runs), default=0)

    @property
    def weakest(self) -> tuple[CoverageRun, ...]:
        """The runs with the fewest ready copies."""
        return tuple(run for run in self.runs if run.ready == self.least_ready)


@dataclass(frozen=True, slots=True)
class CoverageChanged:
    """The least number of ready copies of any layer changed from `before` to `now`; `weakest`: the layers with so few."""

    model: ModelId  # the name of a version
    before: int
    now: int
    weakest: tuple[tuple[int, int], ...]


def coverage(view: View) -> dict[ModelId, Coverage]:
    """The coverage of every version in some live peer's cards, by the name that requests use for it."""
    return {ModelId(version.name): _of(view, version.card) for version in versions(view)}


def changes(before: Mapping[ModelId, Coverage], now: Mapping[ModelId, Coverage], enough: int = 2) -> list[CoverageChanged]:
    """The changes to report: those of the least number of ready copies where the old or the new number is below `enough`.

    A version that is in only one of the two has no copy in the other, so a new one is reported once it is covered.
    """
    found = []
    for model in sorted({*before, *now}):
        old_least = before[model].least_ready if model in before else 0
        new_least = now[model].least_ready if model in now else 0
        if old_least != new_least and min(old_least, new_least) < enough:
            weakest = now[model].weakest if model in now else ()
            found.append(CoverageChanged(model, old_least, new_least, tuple((run.start, run.end) for run in weakest)))
    return found


def _of(view: View, card: ModelCard) -> Coverage:
    steps: Counter[int] = Counter()  # by layer: how many more holders than the layer before has
    ready_steps: Counter[int] = Counter()
    for holder in holders(view, card.id, card.layers, weights=card.weights):
        for start, end in _merged(holder):
            steps[start] += 1
            steps[end] -= 1
            if holder.peer.usable and not holder.peer.overloaded:
                ready_steps[start] += 1
                ready_steps[end] -= 1
    return Coverage(tuple(_runs(steps, ready_steps, card.layers)))


def _runs(steps: Mapping[int, int], ready_steps: Mapping[int, int], layers: int) -> Iterator[CoverageRun]:
    live = ready = 0
    open_run: CoverageRun | None = None
    edges = sorted({0, layers, *steps})
    for start, end in pairwise(edges):
        live, ready = live + steps.get(start, 0), ready + ready_steps.get(start, 0)
        if open_run is not None and (open_run.live, open_run.ready) == (live, ready):
            open_run = CoverageRun(open_run.start, end, live, ready)
            continue
        if open_run is not None:
            yield open_run
        open_run = CoverageRun(start, end, live, ready)
    if open_run is not None:
        yield open_run


def _merged(holder: SpanHolder) -> list[tuple[int, int]]:
    """The holder's spans without overlaps: a layer in two spans is one copy."""
    merged: list[tuple[int, int]] = []
    for start, end in holder.spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
