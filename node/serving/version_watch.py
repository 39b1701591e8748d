"""Says in the log, once for each change, that this node holds other weights than those that answer to their model's id."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from mesh.ids import ModelId
from mesh.versions import NAME_DIGITS, ModelVersion, versions
from mesh.view import View
from node.serving.models import ServedModels

log = structlog.get_logger()


class VersionWatch:
    def __init__(self, changed: Callable[[int], Awaitable[View]], models: ServedModels) -> None:
        """`changed`: as `Membership.changed`."""
        self._changed = changed
        self._models = models
        self._said: dict[ModelId, str] = {}  # by model: the weights that answer instead of this node's own

    async def run(self) -> None:
        """Until cancelled."""
        version = -1
        while True:
            view = await self._changed(version)
            version = view.version
            self.look(view)

    def look(self, view: View) -> None:
        known = versions(view)
        for card in self._models.cards():
            of_model = [version for version in known if version.card.id == card.id]
            mine = next((version for version in of_model if version.card.weights == card.weights), None)
            if mine is None:
                continue  # its files are being hashed, or the view does not tell of it yet
            instead = "" if mine.answers else of_model[0].card.weights
            if instead != self._said.get(card.id, ""):
                self._said[card.id] = instead
                self._say(mine, of_model[0])

    def _say(self, mine: ModelVersion, answering: ModelVersion) -> None:
        weights = mine.card.weights[:NAME_DIGITS]
        if mine.answers:
            log.info("weights.answer", model=mine.card.id, weights=weights, nodes=len(mine.holders))
            return
        log.warning(
            "weights.other_version",
            model=mine.card.id,
            weights=weights,
            nodes=len(mine.holders),
            answering=answering.card.weights[:NAME_DIGITS],
            answering_nodes=len(answering.holders),
            asked_for_as=mine.name,
            do="give this node the files of the others, or start it under another name: mesh up --model NAME=DIR",
        )
