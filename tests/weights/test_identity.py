"""The identity of a model: any other byte is another model, however the same bytes are cut into files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.errors import BadRequest
from node.weights.hashing import HashingProgress, manifest_of, model_files, stamps_of
from node.weights.identity import identity_of
from node.weights.record import RECORD
from node.weights.store import PulledModel
from tests.weights.models import tensors, whole_catalogue, write_model

WIDTH = 320  # the layers' matrices take more than a piece


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_model(tmp_path_factory.mktemp("whole") / "model", files=3, width=WIDTH)
    (made / "merges.txt").write_text("a b\n")
    (made / "generation_config.json").write_text('{"do_sample": false}')
    return made


def changed_copy(directory: Path, folder: Path, name: str, at: int, by: int) -> Path:
    """A copy with one other byte, and with size, time and record as they were."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    before = (copy / name).stat()
    with (copy / name).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ by]))
    os.utime(copy / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    return copy


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_one_other_byte_anywhere_is_another_model_or_none(directory: Path, tmp_path: Path, data: st.DataObject) -> None:
    names = sorted(stamp.name for stamp in stamps_of(directory))
    assert names == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        *(f"model-{number}.safetensors" for number in range(3)),
        "tokenizer.json",
    ]
    name = data.draw(st.sampled_from(names))
    size_bytes = (directory / name).stat().st_size
    at = data.draw(st.one_of(st.integers(0, size_bytes - 1), st.integers(0, min(2000, size_bytes - 1))))
    copy = changed_copy(directory, tmp_path, name, at, data.draw(st.integers(1, 255)))
    try:
        found = identity_of(copy)
    except BadRequest:
        return  # a header that is none any more is refused with its reason
    head_bytes = 8 + int.from_bytes((directory / name).read_bytes()[:8], "little") if name.endswith(".safetensors") else 0
    if found == identity_of(directory):
        assert at < head_bytes, "no byte of a tensor or of a text file"
        assert headers_mean_the_same(directory / name, copy / name), "the tensors are what they were"


def headers_mean_the_same(one: Path, other: Path) -> bool:
    """Space between the words of a header says nothing."""
    heads = [path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")] for path in (one, other)]
    return bool(json.loads(heads[0]) == json.loads(heads[1]))


@pytest.mark.parametrize("kept_in_folder", [True, False])
def test_a_byte_that_changes_with_the_record_beside_it_is_seen_by_the_inode(
    directory: Path, tmp_path: Path, kept_in_folder: bool
) -> None:
    folder = tmp_path / "kept" if kept_in_folder else None
    before = identity_of(directory, folder)
    assert (directory / RECORD).is_file()
    copy = changed_copy(directory, tmp_path, "model-1.safetensors", 900_000, 1)
    assert (copy / RECORD).is_file() and identity_of(copy, folder) != before


def test_the_same_tensors_cut_into_other_files_are_the_same_model(tmp_path: Path) -> None:
    made = [write_model(tmp_path / str(files), files=files, width=WIDTH) for files in (1, 2, 5)]
    assert len({identity_of(each) for each in made}) == 1


def test_a_part_fetched_from_peers_has_the_identity_of_the_whole(directory: Path, tmp_path: Path) -> None:
    whole = whole_catalogue(directory, tmp_path / "kept")
    for number, names in enumerate((["model.layers.0.mlp.weight"], ["model.layers.2.mlp.weight", "lm_head.weight"])):
        files = PulledModel(tmp_path / str(number), whole.manifest)
        for piece in files.missing([*names, "config.json"]):
            files.keep(piece, whole.read(piece.name, piece.number) or b"")
        assert identity_of(tmp_path / str(number)) == identity_of(directory) == whole.id


def test_files_that_no_loader_reads_change_nothing(directory: Path, tmp_path: Path) -> None:
    before = identity_of(directory)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "README.md").write_text("about it")
    (copy / "optimizer.bin").write_bytes(b"state")
    (copy / ".cache").mkdir()
    assert identity_of(copy) == before


@pytest.mark.parametrize(
    "name",
    ["vocab.bpe", "chat_template.jinja", "config.4.9.0.json", "additional_chat_templates/rag.jinja", "sentencepiece.bpe.model"],
)
def test_a_further_file_that_a_loader_reads_is_another_model(directory: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{}")
    assert identity_of(copy) != identity_of(directory)


def test_a_snapshot_of_links_is_hashed_through_them(directory: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(directory, blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        if path.name != RECORD:
            (snapshot / path.name).symlink_to(path)
    assert identity_of(snapshot) == identity_of(directory)
    with (blobs / "merges.txt").open("a") as file:
        file.write("c d\n")
    assert identity_of(snapshot) != identity_of(directory)


def test_threads_and_pieces_make_no_difference(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model_files(directory)
    manifests = []
    for threads, at_once in ((1, 1), (4, 64), (3, 2)):
        monkeypatch.setattr("node.weights.hashing.THREADS", threads)
        monkeypatch.setattr("node.weights.hashing.PIECES_AT_ONCE", at_once)
        manifests.append(manifest_of(found, HashingProgress()))
    assert manifests[0] == manifests[1] == manifests[2]
    assert {tensor.name for tensor in manifests[0].tensors} == set(tensors(WIDTH))
