"""A model's files are hashed once: what is kept of them counts as long as they look the same, and no longer."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from node.weights import catalogue, record
from node.weights.catalogue import IdentifiedWeights, identify
from node.weights.hashing import HashingProgress
from node.weights.record import RECORD, ManifestRecord
from tests.weights.models import tensors, write_file, write_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", files=2)


def found(directory: Path, folder: Path | None = None) -> IdentifiedWeights:
    return identify(directory, folder, HashingProgress())


def test_files_that_stay_as_they_are_are_hashed_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found(directory)
    assert not first.kept

    def never(*_: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr(catalogue, "manifest_of", never)
    again = found(directory)
    assert again.kept
    assert (again.catalogue.id, again.catalogue.places, again.files) == (first.catalogue.id, first.catalogue.places, first.files)
    assert again.written_at_s == first.written_at_s


def content_written(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def time_set(path: Path) -> None:
    os.utime(path, ns=(7, 7))


def other_inode(path: Path) -> None:
    before = path.stat()
    aside = path.with_name("aside")
    aside.write_bytes(path.read_bytes())
    os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
    aside.replace(path)


@pytest.mark.parametrize("change", [content_written, time_set, other_inode])
def test_a_file_that_looks_otherwise_has_all_hashed_again(directory: Path, change: object) -> None:
    found(directory)
    change(directory / "tokenizer.json")  # type: ignore[operator]
    assert not found(directory).kept
    assert found(directory).kept


def test_a_file_more_or_less_has_all_hashed_again(directory: Path) -> None:
    before = found(directory)
    write_file(directory / "model-7.safetensors", {"further.weight": ("F32", (2,))})
    more = found(directory)
    assert not more.kept and more.catalogue.id != before.catalogue.id
    (directory / "model-7.safetensors").unlink()
    assert not found(directory).kept and found(directory).catalogue.id == before.catalogue.id
    names = {name: "model-0.safetensors" for name in tensors()}
    (directory / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"weight_map": names}))
    assert found(directory).catalogue.id != before.catalogue.id, "the index leaves a file out"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xc1",
        b"\x92\x90\xc4\x01x",
        msgspec.msgpack.encode((1, (), b"")),
        msgspec.msgpack.encode((2, (), b"")),
        b"\x91" * 100_000,
    ],
)
def test_a_record_that_is_none_is_made_again(directory: Path, damage: bytes) -> None:
    first = found(directory)
    (directory / RECORD).write_bytes(damage)
    assert found(directory).catalogue.id == first.catalogue.id
    assert found(directory).kept


def test_a_record_with_the_right_files_and_another_manifest_is_not_believed_whole(directory: Path) -> None:
    first = found(directory)
    for manifest in (b"", first.catalogue.encoded[:-1], first.catalogue.encoded + b"\0"):
        (directory / RECORD).write_bytes(msgspec.msgpack.encode(ManifestRecord(1, first.files, manifest)))
        again = found(directory)
        assert not again.kept and again.catalogue.id == first.catalogue.id


def test_where_the_directory_cannot_be_written_the_record_lies_in_the_nodes_own(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mesh.files import replace_file

    def read_only(path: Path, content: bytes, *, mode: int) -> None:
        if path.parent == directory:
            raise PermissionError(13, "Permission denied")
        replace_file(path, content, mode=mode)

    monkeypatch.setattr(record, "replace_file", read_only)
    first = found(directory, tmp_path / "own" / "manifests")
    assert not (directory / RECORD).exists() and list((tmp_path / "own" / "manifests").iterdir())
    assert found(directory, tmp_path / "own" / "manifests").kept
    assert not found(directory, tmp_path / "another").kept
    assert not found(directory).kept and found(directory).catalogue.id == first.catalogue.id, "no disk keeps anything"


def test_nothing_is_written_beside_what_belongs_to_the_package(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_PACKAGE", directory.parent.resolve())
    found(directory, tmp_path / "own")
    assert not (directory / RECORD).exists() and found(directory, tmp_path / "own").kept


def test_a_link_in_the_place_of_the_record_is_not_followed(directory: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (directory / RECORD).symlink_to(victim)
    found(directory)
    assert victim.read_text() == "mine" and not (directory / RECORD).is_symlink()
    assert [path.name for path in directory.glob(f"{RECORD}*")] == [RECORD]


def test_the_newest_weight_file_says_when_the_weights_were_written(directory: Path) -> None:
    os.utime(directory / "model-0.safetensors", ns=(0, 5_999_999_999))
    os.utime(directory / "model-1.safetensors", ns=(0, 3_000_000_000))
    assert found(directory).written_at_s == 5
    os.utime(directory / "model-0.safetensors", ns=(0, -(10**10)))
    assert found(directory).written_at_s == 3
