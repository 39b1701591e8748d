"""A fixed set of models for `node.entry.prompts.Prompts` in tests."""

from __future__ import annotations

from mesh.ids import ModelId
from node.entry.prompts import FindModel
from node.serving.models import ServedModel, ServedModels


def finder(models: ServedModels) -> FindModel:
    async def find(model: ModelId | None) -> ServedModel:
        return models.get(model)

    return find
