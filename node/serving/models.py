"""The models that this node was started with: the directories of their files, their names, their text side."""

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
    """One model of this node, or of a peer, with its text side."""

    card: ModelCard
    directory: Path
    text: ModelText
    fetched: FetchedModel | None = None  # set if the files come from peers, as they are needed


_REPOSITORY = "models--"  # prefix of a model's folder in the hub cache, where `--` replaces the slash of the id


def parse_reference(reference: str) -> tuple[ModelId, Path]:
    """Splits `DIR` or `NAME=DIR` into the model's id and its directory.

    Raises:
        BadRequest: no such directory, or no id follows from its name; the message says what would work.
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
    """The id of the model in `directory`: the directory's name, or `org/name` for a snapshot in the hub cache.

    Links are not followed: a person has named a link to a snapshot.
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
    """The models that a node starts with.

    capacity: layers of each model that fit into memory. wanted: models whose files come from peers. share_bytes: memory for each
    model.
    """

    models: ServedModels
    capacity: dict[ModelId, int]
    wanted: tuple[ModelId, ...]
    share_bytes: int


def split_references(references: Iterable[str], *, joins: bool) -> tuple[list[tuple[ModelId, Path]], list[ModelId]]:
    """Splits references into models with local files, and ids of models that come from peers: any other name, where `joins`.

    Raises:
        BadRequest: as `parse_reference`; or two models have one name.
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
    """This node's models by id, one version of each. The first one added answers requests that name no model."""

    def __init__(self) -> None:
        self._models: dict[ModelId, ServedModel] = {}

    def add(self, model: ServedModel) -> None:
        """Adds a model, or replaces the model with its id."""
        self._models[model.card.id] = model

    @property
    def default(self) -> ModelId | None:
        return next(iter(self._models), None)

    def version(self, model: ModelId, weights: str) -> ServedModel | None:
        """The model, if this node has it in these weights."""
        found = self._models.get(model)
        return found if found is not None and found.card.weights == weights else None

    def update(self, card: ModelCard) -> None:
        """Replaces the card of a model."""
        self._models[card.id] = replace(self._models[card.id], card=card)

    def has(self, model: ModelId | None) -> bool:
        """Whether `get` would return a model."""
        return bool(self._models) if model is None else model in self._models

    def get(self, model: ModelId | None) -> ServedModel:
        """The model by its id, or the default. Raises BadRequest (404, model_not_found), with the names of the models here."""
        if not self.has(model):
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
