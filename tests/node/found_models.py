"""How tests hand a fixed set of models to `node.entry.prompts.Prompts`."""

from __future__ import annotations

from mesh.ids import ModelId
from node.entry.prompts import FindModel
from node.serving.models import ServedModel, ServedModels


def finder(models: ServedModels) -> FindModel:
    async def find(model: ModelId | None) -> ServedModel:
        return models.get(model)

    return find
