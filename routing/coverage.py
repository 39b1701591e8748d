"""How well each version of a model is covered: how many live peers hold each layer, and how many may be given work now.

A pure function of the view, and what changed between two of them. A model is worth a word when a layer comes to its last
ready copy, loses it, or gets it back; not for every copy more or less.
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
    """Layers `[start, end)` that are held by equally many."""

    start: int
    end: int
    live: int  # holders that are alive or suspect, and stay
    ready: int  # of them, those that may be given new work


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of one model; the runs are in order and leave no layer out."""

    runs: tuple[CoverageRun, ...]

    @property
    def least_live(self) -> int:
        return min((run.live for run in self.runs), default=0)

    @property
    def least_ready(self) -> int:
        return min((run.ready for run in self.runs), default=0)

    @property
    def weakest(self) -> tuple[CoverageRun, ...]:
        """Where the fewest ready copies are."""
        return tuple(run for run in self.runs if run.ready == self.least_ready)


@dataclass(frozen=True, slots=True)
class CoverageChanged:
    """The least number of ready copies of any layer went from `before` to `now`; `weakest`: the layers it is about."""

    model: ModelId  # the name of a version
    before: int
    now: int
    weakest: tuple[tuple[int, int], ...]


def coverage(view: View) -> dict[ModelId, Coverage]:
    """Of every version of a model that some live peer knows, by the name that requests ask for it by."""
    return {ModelId(version.name): _of(view, version.card) for version in versions(view)}


def changes(before: Mapping[ModelId, Coverage], now: Mapping[ModelId, Coverage], enough: int = 2) -> list[CoverageChanged]:
    """What is worth telling: the least ready copies differ, and one of the two is below `enough`. A model that is not known
    any more has none; one that was not known before is reported only when it has no layer without a copy."""
    told = []
    for model in sorted({*before, *now}):
        was = before[model].least_ready if model in before else 0
        now_has = now[model].least_ready if model in now else 0
        if was != now_has and min(was, now_has) < enough:
            weakest = now[model].weakest if model in now else ()
            told.append(CoverageChanged(model, was, now_has, tuple((run.start, run.end) for run in weakest)))
    return told


def _of(view: View, card: ModelCard) -> Coverage:
    steps: Counter[int] = Counter()  # at a layer: so many holders more than at the one before
    ready_steps: Counter[int] = Counter()
    for holder in holders(view, card.id, card.layers, weights=card.weights):
        for start, end in _merged(holder):
            steps[start] += 1
            steps[end] -= 1
            if _is_ready(holder):
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
    """Its spans as they cover layers: what two of them share counts once."""
    merged: list[tuple[int, int]] = []
    for start, end in holder.spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _is_ready(holder: SpanHolder) -> bool:
    return holder.peer.usable and not holder.peer.overloaded
