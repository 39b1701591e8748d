"""A stage loaded from fetched files alone computes what the whole directory computes, bit for bit."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from mesh.errors import BadRequest
from node.engine import selfcheck
from node.engine.loading import load_stage
from node.engine.model.checkpoint import Checkpoint, read_checkpoint
from node.weights.catalogue import identify
from node.weights.fetching import _of_span
from node.weights.hashing import HashingProgress
from node.weights.store import PulledModel
from tests.weights.models import content_of


def pulled(directory: Path, folder: Path, start: int, end: int) -> tuple[Checkpoint, Path]:
    whole = read_checkpoint(directory)
    source = identify(directory, folder / "kept", HashingProgress()).catalogue
    files = PulledModel(folder / f"{start}-{end}", source.manifest)

    def fetch(names: Iterable[str]) -> None:
        for piece in files.missing(names):
            files.keep(piece, content_of(source, piece.name, piece.number))

    fetch([file.name for file in source.manifest.files])
    fetch([tensor.name for tensor in _of_span(files, whole.layers, start, end)])
    return whole, files.directory


@pytest.mark.parametrize(("name", "start", "end"), [("llama", 1, 3), ("llama_tied", 2, 4), ("gpt2", 0, 2), ("qwen3_moe", 1, 3)])
def test_a_span_from_fetched_files_is_the_same_stage(
    name: str, start: int, end: int, tmp_path: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    whole, directory = pulled(checkpoint_of(name), tmp_path, start, end)
    part = read_checkpoint(directory)
    assert part.weights == whole.weights, "what a part cannot tell of the whole, its mark does"
    loaded = [load_stage(checkpoint, start, end, "float32", 1) for checkpoint in (whole, part)]
    assert loaded[0].numerics == loaded[1].numerics, "one fingerprint, so a path may go over both"
    stages = [each.stage for each in loaded]
    outputs = [selfcheck.run_batch(stage, [(selfcheck.SelfcheckInput(stage, 1, 20), 20)]) for stage in stages]
    assert torch.equal(*outputs)
    assert stages[0].parameters == stages[1].parameters


def test_layers_that_were_not_fetched_are_missed_and_not_made_up(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    _, directory = pulled(checkpoint_of("llama"), tmp_path, 1, 3)
    with pytest.raises(BadRequest, match="lacks"):
        load_stage(read_checkpoint(directory), 0, 3, "float32", 1)
