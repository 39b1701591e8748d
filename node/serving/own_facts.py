"""What this node tells of itself: one record, changed here and published whole."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mesh.ids import ModelId
from mesh.view import Facts, Loading, ModelCard, Readiness, Span


class OwnFacts:
    """`publish` is membership's; each change goes out at once."""

    def __init__(self, facts: Facts, publish: Callable[[Facts], None]) -> None:
        self._facts = facts
        self._publish = publish

    @property
    def now(self) -> Facts:
        return self._facts

    def _set(self, **changes: object) -> None:
        changed = msgspec.structs.replace(self._facts, **changes)
        if changed != self._facts:
            self._facts = changed
            self._publish(changed)

    def serve_http_at(self, url: str) -> None:
        self._set(http=url)

    def know(self, card: ModelCard, capacity_layers: int | None) -> None:
        """A model whose files are here, served or not. `capacity_layers` None: its spans are pinned, whatever else would fit."""
        others = tuple(known for known in self._facts.models if known.id != card.id)
        capacity = {model: layers for model, layers in self._facts.capacity.items() if model != card.id}
        if capacity_layers is not None:
            capacity[card.id] = capacity_layers
        self._set(models=(*others, card), capacity=capacity)

    def intend(self, spans: tuple[Span, ...]) -> None:
        """What is going to be served and is not yet, of all models."""
        self._set(intends=spans, loading=self._loading_of(spans))

    def load(self, model: ModelId, loading: Loading) -> None:
        """How far it is with what it intends of the model."""
        if any(span.model == model for span in self._facts.intends):
            self._set(loading={**self._facts.loading, model: loading})

    def serve(self, card: ModelCard, spans: tuple[Span, ...]) -> None:
        """The spans that serve now, of this model; those are intended no longer."""
        model: ModelId = card.id
        others = tuple(span for span in self._facts.spans if span.model != model)
        intends = tuple(span for span in self._facts.intends if span not in spans)
        cards = tuple(card if known.id == model else known for known in self._facts.models)
        serving = tuple(sorted({*others, *spans}))
        self._set(spans=serving, intends=intends, models=cards, loading=self._loading_of(intends))

    def _loading_of(self, intends: tuple[Span, ...]) -> dict[ModelId, Loading]:
        models = {span.model for span in intends}
        return {model: told for model, told in self._facts.loading.items() if model in models}

    def ready(self, readiness: Readiness) -> None:
        self._set(readiness=readiness)

    def compute_uncompiled(self, why: str) -> None:
        """Layers are served here without the compiled kernel; empty: none are."""
        self._set(uncompiled=why)

    def twin(self, where: str) -> None:
        self._set(twin=where)

    def drain(self) -> None:
        self._set(draining=True, readiness=Readiness.DRAINING)

    def documents(self, record: dict[str, object]) -> None:
        self._set(documents=record)
