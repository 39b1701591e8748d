"""How tests hand a fixed set of models to `node.entry.prompts.Prompts`."""

from __future__ import annotations

from mesh.ids import ModelId
from node.entry.prompts import FindModel
from node.serving.models import Models, ServedModel


def finder(models: Models) -> FindModel:
    async def find(model: ModelId | None) -> ServedModel:
        return models.get(model)

    return find
