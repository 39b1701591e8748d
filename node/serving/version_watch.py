"""Logs, once for each change, that this node holds other weights than those that answer to the model's id."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from mesh.ids import ModelId
from mesh.versions import NAME_DIGITS, ModelVersion, versions
from mesh.view import View
from node.serving.models import ServedModels

log = structlog.get_logger()


class VersionWatch:
    """Compares this node's versions of its models with those that answer in the mesh."""

    def __init__(self, changed: Callable[[int], Awaitable[View]], models: ServedModels) -> None:
        """`changed`: as `Membership.changed`."""
        self._changed = changed
        self._models = models
        self._logged: dict[ModelId, str] = {}  # by model: the weights that answer instead of this node's own, as last logged

    async def run(self) -> None:
        """Follows the view until cancelled."""
        version = -1
        while True:
            view = await self._changed(version)
            version = view.version
            self.update(view)

    def update(self, view: View) -> None:
        """Logs which weights answer for each model, where that has changed since the last view."""
        known = versions(view)
        for card in self._models.cards():
            of_model = [version for version in known if version.card.id == card.id]
            own = next((version for version in of_model if version.card.weights == card.weights), None)
            if own is None:
                continue  # the files are being hashed, or the view does not contain the card yet
            other_weights = "" if own.answers else of_model[0].card.weights
            if other_weights != self._logged.get(card.id, ""):
                self._logged[card.id] = other_weights
                self._log(own, of_model[0])

    def _log(self, own: ModelVersion, answering: ModelVersion) -> None:
        weights = own.card.weights[:NAME_DIGITS]
        if own.answers:
            log.info("weights.answer", model=own.card.id, weights=weights, nodes=len(own.holders))
            return
        log.warning(
            "weights.other_version",
            model=own.card.id,
            weights=weights,
            nodes=len(own.holders),
            answering=answering.card.weights[:NAME_DIGITS],
            answering_nodes=len(answering.holders),
            asked_for_as=own.name,
            do="give this node the files of the others, or start it under another name: mesh up --model NAME=DIR",
        )
