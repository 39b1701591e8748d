"""The facts that this node publishes about itself: one record, changed here and published whole."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from mesh.ids import ModelId
from mesh.view import Facts, Loading, ModelCard, Readiness, Span


class OwnFacts:
    """This node's facts. Each change is published at once by `publish`, membership's."""

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

    def set_http(self, url: str) -> None:
        self._set(http=url)

    def set_model(self, card: ModelCard, capacity_layers: int | None) -> None:
        """Sets the card of a model whose files are here, served or not. `capacity_layers` None: its spans are pinned."""
        others = tuple(known for known in self._facts.models if known.id != card.id)
        capacity = {model: layers for model, layers in self._facts.capacity.items() if model != card.id}
        if capacity_layers is not None:
            capacity[card.id] = capacity_layers
        self._set(models=(*others, card), capacity=capacity)

    def set_intended(self, spans: tuple[Span, ...]) -> None:
        """Sets the spans of all models that are going to be served and are not yet."""
        self._set(intends=spans, loading=self._loading_of(spans))

    def set_loading(self, model: ModelId, loading: Loading) -> None:
        """Sets the progress with a model's intended spans; ignored for a model without any."""
        if any(span.model == model for span in self._facts.intends):
            self._set(loading={**self._facts.loading, model: loading})

    def set_serving(self, card: ModelCard, spans: tuple[Span, ...]) -> None:
        """Sets the spans of a model that serve now; they are no longer intended."""
        model: ModelId = card.id
        others = tuple(span for span in self._facts.spans if span.model != model)
        intends = tuple(span for span in self._facts.intends if span not in spans)
        cards = tuple(card if known.id == model else known for known in self._facts.models)
        serving = tuple(sorted({*others, *spans}))
        self._set(spans=serving, intends=intends, models=cards, loading=self._loading_of(intends))

    def _loading_of(self, intends: tuple[Span, ...]) -> dict[ModelId, Loading]:
        models = {span.model for span in intends}
        return {model: loading for model, loading in self._facts.loading.items() if model in models}

    def set_readiness(self, readiness: Readiness) -> None:
        self._set(readiness=readiness)

    def set_uncompiled(self, why: str) -> None:
        """Sets why layers are served here without the compiled kernel; empty if none are."""
        self._set(uncompiled=why)

    def set_twin(self, where: str) -> None:
        """Sets the address of another live process with this node's identity; empty if there is none."""
        self._set(twin=where)

    def set_draining(self) -> None:
        self._set(draining=True, readiness=Readiness.DRAINING)

    def set_documents(self, record: dict[str, object]) -> None:
        """Sets the summary of this node's document stores (`rag.wire.Summary` as builtins)."""
        self._set(documents=record)
