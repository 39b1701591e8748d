"""The models this node was given: where their files are, what they are called, their text side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mesh.errors import BadRequest
from mesh.ids import ModelId
from mesh.view import ModelCard
from node.model_text import ModelText
from node.weights.fetching import Fetched


@dataclass(frozen=True, slots=True)
class ServedModel:
    card: ModelCard
    directory: Path
    text: ModelText
    fetched: Fetched | None = None  # its files come from peers, as they are needed


def parse_reference(reference: str) -> tuple[ModelId, Path]:
    """`DIR` or `NAME=DIR` as the model's id and its directory.

    Raises:
        BadRequest: no such directory, with what would work.
    """
    name, equals, path = reference.partition("=")
    directory = Path(path if equals else reference).expanduser()
    if not directory.is_dir():
        raise BadRequest(
            f"--model {reference}: there is no directory {directory}; give a directory that save_pretrained wrote "
            "(config.json, *.safetensors, tokenizer), NAME=DIR, or with --join the id of a model that peers serve",
            "model",
        )
    return ModelId(name if equals else directory.resolve().name), directory


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a node starts with. `capacity`: layers of each model that it could hold; `share_bytes`: of its memory, for each model;
    `wanted`: models whose files come from peers.
    """

    models: Models
    capacity: dict[ModelId, int]
    wanted: tuple[ModelId, ...]
    share_bytes: int


def split_references(references: Iterable[str], *, joins: bool) -> tuple[list[tuple[ModelId, Path]], list[ModelId]]:
    """Models whose files are here, and the ids of those that come from peers: any other name, given to a node that joins some.

    Raises:
        BadRequest: as `parse_reference`.
    """
    here, wanted = [], []
    for reference in references:
        is_path = "=" in reference or reference.startswith((".", "/", "~")) or Path(reference).expanduser().is_dir()
        if joins and not is_path and reference:
            wanted.append(ModelId(reference))
        else:
            here.append(parse_reference(reference))
    return here, wanted


class Models:
    """By id. The first one added answers requests that name no model."""

    def __init__(self) -> None:
        self._models: dict[ModelId, ServedModel] = {}

    def add(self, model: ServedModel) -> None:
        self._models[model.card.id] = model

    def update(self, card: ModelCard) -> None:
        """A span was loaded: the card now has its numerics."""
        self._models[card.id] = replace(self._models[card.id], card=card)

    def knows(self, model: ModelId | None) -> bool:
        """Whether `get` gives one."""
        return bool(self._models) if model is None else model in self._models

    def get(self, model: ModelId | None) -> ServedModel:
        """Raises BadRequest (404, model_not_found), naming what is there."""
        if not self.knows(model):
            raise unknown_model(model, self._models)
        return next(iter(self._models.values())) if model is None else self._models[model]

    def cards(self) -> list[ModelCard]:
        return [model.card for model in self._models.values()]

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(list(self._models.values()))


def unknown_model(model: ModelId | None, known: Iterable[ModelId]) -> BadRequest:
    names = ", ".join(sorted(known)) or "none"
    what = "no model is named, and there is none" if model is None else f"there is no model {model[:80]!r}"
    return BadRequest(f"{what} here; known: {names}", "model", "model_not_found", 404)
