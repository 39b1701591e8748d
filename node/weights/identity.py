"""The weights of a model directory, whichever way its files came to be there: the identity that fingerprints begin with."""

from __future__ import annotations

from pathlib import Path

from node.weights.catalogue import identify
from node.weights.hashing import HashingProgress
from node.weights.store import MARK, PulledModel


def identity_of(directory: Path, folder: Path | None = None) -> str:
    """The hash of the model's manifest (*blocking*: from its record, else a second a gigabyte and thread).

    A directory whose files come from peers holds a part of the model, with the identity of the whole.
    `folder`: where a record is kept that cannot lie beside the files; None: nowhere.

    Raises:
        BadRequest: a damaged file, or files that change all the time.
        OSError: a file cannot be read.
    """
    if (directory / MARK).is_file():
        return PulledModel.at(directory).catalogue.id
    return identify(directory, folder, HashingProgress()).catalogue.id
