"""The models this node was given: where their files are, what they are called, their text side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mesh.errors import BadRequest
from mesh.ids import ModelId
from mesh.view import ModelCard
from node.checkpoints.model_directory import EXPECTED, gguf_reason
from node.text.tokenizer import ModelText
from node.weights.fetching import FetchedModel


@dataclass(frozen=True, slots=True)
class ServedModel:
    card: ModelCard
    directory: Path
    text: ModelText
    fetched: FetchedModel | None = None  # its files come from peers, as they are needed


_REPOSITORY = "models--"  # begins the name of a model's folder in the hub cache; `--` stands for the slash of its id


def parse_reference(reference: str) -> tuple[ModelId, Path]:
    """`DIR` or `NAME=DIR` as the model's id and its directory.

    Raises:
        BadRequest: no such directory, or no id to be had from its name; with what would work.
    """
    name, equals, path = ("", "", reference) if _exists(reference) else reference.partition("=")
    directory = Path(os.path.expanduser(path if equals else reference))
    if equals and not path:
        raise BadRequest(f"--model {reference}: expected NAME=DIR, got no directory behind the =", "model")
    if os.path.isfile(directory):
        raise BadRequest(f"--model {reference}: {_no_directory(directory)}", "model")
    if not os.path.isdir(directory):
        raise BadRequest(
            f"--model {reference}: there is no directory {directory} that this user may see; give a directory as save_pretrained "
            "makes it (config.json, *.safetensors, tokenizer), NAME=DIR, or with --join the id of a model that peers serve",
            "model",
        )
    model = name if equals else id_of_directory(directory)
    if not model.strip() or not model.isprintable():
        raise BadRequest(f"--model {reference}: expected a name for the model, got {model!r}; give NAME=DIR", "model")
    return ModelId(model), directory


def id_of_directory(directory: Path) -> str:
    """What the model in `directory` is called: the directory's name, and `org/name` for a snapshot in the hub cache.

    Links are not followed: a link to a snapshot has a name of its own, given by a person.
    """
    path = Path(os.path.abspath(directory))
    repository = path.parents[1].name if len(path.parents) > 1 else ""
    if path.parent.name == "snapshots" and repository.startswith(_REPOSITORY):
        return repository.removeprefix(_REPOSITORY).replace("--", "/")
    return path.name


def _exists(reference: str) -> bool:
    return os.path.exists(os.path.expanduser(reference))


def _no_directory(file: Path) -> str:
    if file.suffix == ".gguf":
        return f"{file.name} is a GGUF file; {gguf_reason()}"
    beside = (file.parent / "config.json").is_file()
    return f"{file.name} is a file; {f'give its directory, {file.parent}' if beside else EXPECTED}"


@dataclass(frozen=True, slots=True)
class InitialModels:
    """What a node starts with. `capacity`: layers of each model that it could hold; `share_bytes`: of its memory, for each model;
    `wanted`: models whose files come from peers.
    """

    models: ServedModels
    capacity: dict[ModelId, int]
    wanted: tuple[ModelId, ...]
    share_bytes: int


def split_references(references: Iterable[str], *, joins: bool) -> tuple[list[tuple[ModelId, Path]], list[ModelId]]:
    """Models whose files are here, and the ids of those that come from peers: any other name, given to a node that joins some.

    Raises:
        BadRequest: as `parse_reference`; two models of one name.
    """
    here: list[tuple[ModelId, Path]] = []
    wanted: list[ModelId] = []
    for reference in references:
        is_path = "=" in reference or reference.startswith((".", "/", "~")) or _exists(reference)
        if joins and not is_path and reference:
            wanted.append(ModelId(reference))
        else:
            here.append(parse_reference(reference))
    ids = [*(model for model, _ in here), *wanted]
    twice = next((model for model in ids if ids.count(model) > 1), None)
    if twice is not None:
        raise BadRequest(f"--model: {twice} is given twice; give one of them another name with NAME=DIR", "model")
    return here, wanted


class ServedModels:
    """By id: of one id a node has one version. The first one added answers requests that name no model."""

    def __init__(self) -> None:
        self._models: dict[ModelId, ServedModel] = {}

    def add(self, model: ServedModel) -> None:
        """In the place of what was known under the id."""
        self._models[model.card.id] = model

    @property
    def default(self) -> ModelId | None:
        return next(iter(self._models), None)

    def version(self, model: ModelId, weights: str) -> ServedModel | None:
        """The model, if what this node has of it are these weights."""
        found = self._models.get(model)
        return found if found is not None and found.card.weights == weights else None

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
