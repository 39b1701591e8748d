"""How tests hand a fixed set of models to `node.prompts.Prompts`."""

from __future__ import annotations

from mesh.ids import ModelId
from node.models import Models, ServedModel
from node.prompts import FindModel


def finder(models: Models) -> FindModel:
    async def find(model: ModelId | None) -> ServedModel:
        return models.get(model)

    return find
