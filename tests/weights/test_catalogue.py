"""What a node tells of a model directory, and hands out of it."""

from pathlib import Path

import msgspec
import pytest

from mesh.errors import BadRequest
from mesh.manifest import PIECE_BYTES, FileEntry, Manifest, TensorEntry, encode, pieces_of
from node.checkpoints.safetensors_header import read_header, weight_files
from node.weights import catalogue, hashing
from node.weights.catalogue import Catalogue, identify
from node.weights.hashing import HashingProgress, HashingStopped, ModelFiles, stamps_of
from tests.weights.models import content_of, contents, tensors, whole_catalogue, write_file, write_model


def test_the_same_model_cut_into_other_files_is_the_same_model(tmp_path: Path) -> None:
    one = whole_catalogue(write_model(tmp_path / "one"), tmp_path / "kept")
    three = whole_catalogue(write_model(tmp_path / "three", files=3), tmp_path / "kept")
    assert one.id == three.id and one.encoded == three.encoded
    assert one.places != three.places


def test_one_other_byte_is_another_model(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "one")
    before = whole_catalogue(directory, tmp_path / "kept").id
    path = directory / "model-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert whole_catalogue(directory, tmp_path / "kept").id != before


def test_only_the_text_side_and_tensors_are_told_of_and_no_code(tmp_path: Path) -> None:
    manifest = whole_catalogue(write_model(tmp_path / "one"), tmp_path / "kept").manifest
    assert [file.name for file in manifest.files] == ["config.json", "tokenizer.json"]
    assert {tensor.name for tensor in manifest.tensors} == set(tensors())


def test_every_piece_read_is_what_the_manifest_says(tmp_path: Path) -> None:
    catalogue = whole_catalogue(write_model(tmp_path / "one", files=2, width=320), tmp_path / "kept")
    read = {}
    entries: list[FileEntry | TensorEntry] = [*catalogue.manifest.files, *catalogue.manifest.tensors]
    for entry in entries:
        pieces = list(pieces_of(entry))
        assert all(piece.matches(content_of(catalogue, piece.name, piece.number)) for piece in pieces)
        read[entry.name] = b"".join(content_of(catalogue, piece.name, piece.number) for piece in pieces)
    assert {name: read[name] for name in tensors(320)} == contents(tensors(320))
    assert max(len(each) for each in read.values()) > PIECE_BYTES, "a tensor of several pieces was among them"


@pytest.mark.parametrize(("name", "number"), [("nonsuch", 0), ("config.json", 1), ("config.json", -1), ("config.json", 1 << 60)])
def test_what_is_not_there_is_not_read(tmp_path: Path, name: str, number: int) -> None:
    assert whole_catalogue(write_model(tmp_path / "one"), tmp_path / "kept").read(name, number) is None


def test_a_file_that_shrank_since_is_told_and_not_padded(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "one")
    catalogue = whole_catalogue(directory, tmp_path / "kept")
    (directory / "tokenizer.json").write_text("")
    with pytest.raises(OSError, match="shorter"):
        catalogue.read("tokenizer.json", 0)


def test_hashing_ends_when_it_is_told_to(tmp_path: Path) -> None:
    progress = HashingProgress()
    progress.stop.set()
    with pytest.raises(HashingStopped):
        identify(write_model(tmp_path / "one"), tmp_path / "kept", progress)


def test_hashing_says_how_far_it_has_come(tmp_path: Path) -> None:
    progress = HashingProgress()
    found = identify(write_model(tmp_path / "one", width=320), tmp_path / "kept", progress)
    entries: list[FileEntry | TensorEntry] = [*found.catalogue.manifest.files, *found.catalogue.manifest.tensors]
    assert progress.bytes == progress.bytes_done == sum(entry.size_bytes for entry in entries)


def test_files_that_change_while_they_are_hashed_are_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "one")
    changes = iter(["1", "22"])

    manifest_of = hashing.manifest_of

    def then_change(files: ModelFiles, progress: HashingProgress) -> Manifest:
        manifest = manifest_of(files, progress)
        if text := next(changes, ""):
            (directory / "tokenizer.json").write_text(text)
        return manifest

    monkeypatch.setattr(catalogue, "manifest_of", then_change)
    found = identify(directory, None, HashingProgress())
    assert found.files == stamps_of(directory)
    assert next(entry for entry in found.catalogue.manifest.files if entry.name == "tokenizer.json").size_bytes == 2
    changes = iter(["1", "22", "333"])
    (directory / ".mesh-manifest").unlink()
    with pytest.raises(BadRequest, match="complete"):
        identify(directory, None, HashingProgress())


def test_a_manifest_out_of_the_bounds_that_peers_accept_still_is_an_identity(tmp_path: Path) -> None:
    found = whole_catalogue(write_model(tmp_path / "one"), tmp_path / "kept")
    assert found.is_fit_for_peers()
    wide = msgspec.structs.replace(found.manifest, files=tuple(FileEntry("config.json", 0, b"") for _ in range(2)))
    assert not Catalogue(encode(wide), wide, {}).is_fit_for_peers()


def test_a_tensor_that_is_in_two_files_counts_as_the_loader_takes_it(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "one", files=2)
    names = {name: path.name for path in weight_files(directory) for name in read_header(path)}
    before = whole_catalogue(directory, tmp_path / "kept")
    first = {name: shape for name, shape in tensors().items() if names[name] == "model-0.safetensors"}
    moved = next(name for name in tensors() if names[name] == "model-1.safetensors")
    write_file(directory / "model-0.safetensors", {**first, moved: tensors()[moved]}, {moved: 1})
    assert whole_catalogue(directory, tmp_path / "kept").id == before.id, "the last file's tensor counts"
    write_file(directory / "model-2.safetensors", {moved: tensors()[moved]}, {moved: 1})
    assert whole_catalogue(directory, tmp_path / "kept").id != before.id


def test_of_weights_that_are_there_twice_the_files_of_the_index_count(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "one", files=2)
    write_file(directory / "consolidated.safetensors", {"tok_embeddings.weight": ("F32", (4, 4))})
    (directory / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}'
    )
    assert [path.name for path in weight_files(directory)] == ["model-0.safetensors", "model-1.safetensors"]
    (directory / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(BadRequest, match="damaged"):
        weight_files(directory)
    (directory / "model.safetensors.index.json").unlink()
    write_file(directory / "model.safetensors", {"x": ("F32", (1,))})
    assert [path.name for path in weight_files(directory)] == ["model.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "length", "json", "outside"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, {"x": ("F32", (100,))})
    content = path.read_bytes()
    wrong = {
        "cut": content[:-1],
        "length": b"\xff" * 8 + content[8:],
        "json": content[:8] + b"[" + content[9:],
        "outside": content.replace(b"400]", b"999]"),
    }[damage]
    path.write_bytes(wrong)
    with pytest.raises(BadRequest, match="again"):
        read_header(path)


def test_a_tensor_whose_size_is_not_its_shapes_is_not_offered(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "one")
    path = directory / "model-0.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1))
    with pytest.raises(BadRequest, match="size"):
        whole_catalogue(directory, tmp_path / "kept")
