"""Publishes how far this node has loaded the layers that it is going to serve: to peers in its facts, to the operator in its log.

The progress of a load is estimated: its share from the bytes fetched from peers and the engine's phases, the time to go from the
time that this share took. Changes are published at most every `PUBLISH_EVERY_S`, as each goes to every member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import trio

from mesh.ids import ModelId
from mesh.view import MAX_ETA_S, Loading, Span
from node.serving.own_facts import OwnFacts

UPDATE_EVERY_S = 0.5
PUBLISH_EVERY_S = 2.0
LOG_EVERY_S = 5.0
FETCHED_SHARE = 0.5  # share of a span's progress that fetching its files from peers, or hashing them, counts for
MIN_SHARE = 0.05  # below this share, the time it took is no basis for the time to go
FIRST_GUESS_S = 10.0

log = structlog.get_logger()


class SpanProgress(Protocol):
    """How far the engine is with a span (`node.engine.model.progress.LoadProgress`)."""

    @property
    def share(self) -> float: ...


@dataclass(slots=True)
class _ModelLoad:
    """The load of one model's intended spans."""

    begun_at: float
    spans: set[Span] = field(default_factory=set)  # all spans of this load, with those that serve by now
    fetched: bool = False  # whether files were fetched or hashed for it
    published_at: float = -PUBLISH_EVERY_S
    logged_at: float = 0.0


class LoadState:
    """Watches this node's loads.

    engine: progress of the spans that the engine loads now. fetching: by model, the share of its files that has been fetched from
    peers, or hashed; None if neither is under way.
    """

    def __init__(
        self,
        facts: OwnFacts,
        engine: Callable[[], Mapping[Span, SpanProgress]],
        fetching: Callable[[ModelId], float | None],
    ) -> None:
        self._facts, self._engine, self._fetching = facts, engine, fetching
        self._loads: dict[ModelId, _ModelLoad] = {}

    async def run(self) -> None:
        """Updates and publishes the progress until cancelled."""
        while True:
            self.update(trio.current_time())
            await trio.sleep(UPDATE_EVERY_S)

    def update(self, now: float) -> None:
        """Publishes and logs what has changed since the last update."""
        intended: dict[ModelId, set[Span]] = {}
        for span in self._facts.now.intends:
            intended.setdefault(span.model, set()).add(span)
        for model in [model for model in self._loads if model not in intended]:
            load = self._loads.pop(model)
            log.info("node.loaded", model=model, layers=_ranges(load.spans), seconds=round(now - load.begun_at, 1))
        if not intended:
            return
        engine = self._engine()
        for model, spans in intended.items():
            self._update_model(model, spans, engine, now)

    def _update_model(self, model: ModelId, spans: set[Span], engine: Mapping[Span, SpanProgress], now: float) -> None:
        serving = set(self._facts.now.spans)
        is_new = model not in self._loads
        load = self._loads.setdefault(model, _ModelLoad(now, logged_at=now))
        load.spans = {span for span in load.spans if span in serving} | spans
        share = self._share(model, load, serving, engine)
        loading = Loading(min(99, int(100 * share)), min(MAX_ETA_S, round(eta_s(share, now - load.begun_at))))
        if self._facts.now.loading.get(model) != loading and now - load.published_at >= PUBLISH_EVERY_S:
            load.published_at = now
            self._facts.set_loading(model, loading)
        if is_new:
            why = "HTTP answers; requests that need these layers get 503 model_loading until they serve"
            log.info("node.loading", model=model, layers=_ranges(spans), why=why)
        elif now - load.logged_at >= LOG_EVERY_S:
            load.logged_at = now
            log.info("node.loading", model=model, layers=_ranges(spans), progress=f"{share:.0%}", eta_s=loading.eta_s)

    def _share(self, model: ModelId, load: _ModelLoad, serving: set[Span], engine: Mapping[Span, SpanProgress]) -> float:
        """The share of a load that is done, 0..1, in layers."""
        fetched = self._fetching(model)
        load.fetched |= fetched is not None
        done = 0.0
        for span in load.spans:
            if span in serving:
                done += span.end - span.start
            elif span in engine:
                share = engine[span].share
                done += (span.end - span.start) * (FETCHED_SHARE + (1 - FETCHED_SHARE) * share if load.fetched else share)
        if fetched is not None and (pending := sorted(span for span in load.spans - serving if span not in engine)):
            done += (pending[0].end - pending[0].start) * FETCHED_SHARE * fetched  # spans are fetched one after another
        return done / sum(span.end - span.start for span in load.spans)


def eta_s(share: float, elapsed_s: float) -> float:
    """Estimated time to go, in proportion to the time that `share` took; below `MIN_SHARE`, as long again as it took."""
    if share < MIN_SHARE:
        return max(FIRST_GUESS_S, elapsed_s)
    return elapsed_s * (1 - share) / share


def _ranges(spans: set[Span]) -> list[str]:
    return [f"{span.start}:{span.end}" for span in sorted(spans)]
