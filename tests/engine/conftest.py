"""Shared checkpoints: made once a session, for they are only read."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

# torch is imported where it is used: the process that only hands tests out to others does without, and starts 5 s sooner.


def pytest_collection_finish() -> None:
    """Exempts what is imported by now from garbage collection: each pass over torch and transformers takes half a second."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of the named tiny checkpoint."""
    from tests.engine.checkpoints import make_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(root, name)
        return made[name]

    return find


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.engine.random_model import make_random_model

    return make_random_model(tmp_path_factory.mktemp("random") / "model")
