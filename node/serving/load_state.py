"""Tells how far this node is with the layers that it is going to serve: peers in its facts, the operator in its log.

A load has no clock that could be asked: the share that is done comes from the bytes fetched from peers and from the engine's
phases, and the time to go from the time that share has taken. Both are estimates, and told seldom: each telling goes to all.
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

LOOK_EVERY_S = 0.5
TELL_EVERY_S = 2.0  # to peers, at most
LOG_EVERY_S = 5.0
FETCHED_SHARE = 0.5  # of the way to a span, that fetching its files from peers counts for, or hashing them: disks differ
KNOWN_FROM = 0.05  # below this share the time it took says little of the time to go
FIRST_GUESS_S = 10.0

log = structlog.get_logger()


class SpanProgress(Protocol):
    """How far the engine is with a span (`node.engine.model.progress.LoadProgress`)."""

    @property
    def share(self) -> float: ...


@dataclass(slots=True)
class _Begun:
    """A model of which layers are intended."""

    at: float
    spans: set[Span] = field(default_factory=set)  # all that this load is about, those that serve by now included
    fetched: bool = False  # files came from peers on the way
    told_at: float = -TELL_EVERY_S
    logged_at: float = 0.0


class LoadState:
    """`engine`: the spans that it loads now; `fetching`: by model, the share that is ready of the files that are being fetched
    from peers, or hashed, before they can be loaded."""

    def __init__(
        self,
        facts: OwnFacts,
        engine: Callable[[], Mapping[Span, SpanProgress]],
        fetching: Callable[[ModelId], float | None],
    ) -> None:
        self._facts, self._engine, self._fetching = facts, engine, fetching
        self._begun: dict[ModelId, _Begun] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look(trio.current_time())
            await trio.sleep(LOOK_EVERY_S)

    def look(self, now: float) -> None:
        """Tells what is new since the last look."""
        intended: dict[ModelId, set[Span]] = {}
        for span in self._facts.now.intends:
            intended.setdefault(span.model, set()).add(span)
        for model in [model for model in self._begun if model not in intended]:
            begun = self._begun.pop(model)
            log.info("node.loaded", model=model, layers=_ranges(begun.spans), seconds=round(now - begun.at, 1))
        if not intended:
            return
        engine = self._engine()
        for model, spans in intended.items():
            self._look_at(model, spans, engine, now)

    def _look_at(self, model: ModelId, spans: set[Span], engine: Mapping[Span, SpanProgress], now: float) -> None:
        serving = set(self._facts.now.spans)
        is_new = model not in self._begun
        begun = self._begun.setdefault(model, _Begun(now, logged_at=now))
        begun.spans = {span for span in begun.spans if span in serving} | spans
        share = self._share(model, begun, serving, engine)
        found = Loading(min(99, int(100 * share)), min(MAX_ETA_S, round(eta_s(share, now - begun.at))))
        if self._facts.now.loading.get(model) != found and now - begun.told_at >= TELL_EVERY_S:
            begun.told_at = now
            self._facts.load(model, found)
        if is_new:
            why = "HTTP answers; requests that need these layers get 503 model_loading until they serve"
            log.info("node.loading", model=model, layers=_ranges(spans), why=why)
        elif now - begun.logged_at >= LOG_EVERY_S:
            begun.logged_at = now
            log.info("node.loading", model=model, layers=_ranges(spans), progress=f"{share:.0%}", eta_s=found.eta_s)

    def _share(self, model: ModelId, begun: _Begun, serving: set[Span], engine: Mapping[Span, SpanProgress]) -> float:
        """The share that is done, each layer counting alike."""
        fetched = self._fetching(model)
        begun.fetched |= fetched is not None
        done = 0.0
        for span in begun.spans:
            if span in serving:
                done += span.end - span.start
            elif span in engine:
                share = engine[span].share
                done += (span.end - span.start) * (FETCHED_SHARE + (1 - FETCHED_SHARE) * share if begun.fetched else share)
        if fetched is not None and (next_ones := sorted(span for span in begun.spans - serving if span not in engine)):
            done += (next_ones[0].end - next_ones[0].start) * FETCHED_SHARE * fetched  # spans come one after another
        return done / sum(span.end - span.start for span in begun.spans)


def eta_s(share: float, elapsed_s: float) -> float:
    """Estimated time to go: as the share that is done took, and while there is none to speak of, as long again as it took."""
    if share < KNOWN_FROM:
        return max(FIRST_GUESS_S, elapsed_s)
    return elapsed_s * (1 - share) / share


def _ranges(spans: set[Span]) -> list[str]:
    return [f"{span.start}:{span.end}" for span in sorted(spans)]
