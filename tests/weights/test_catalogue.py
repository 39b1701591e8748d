"""What a node tells of a model directory, and hands out of it."""

import threading

import pytest

from mesh.errors import BadRequest
from mesh.weights import PIECE_BYTES, pieces_of
from node.safetensors_header import read_header, weight_files
from node.weights import catalogue as module
from node.weights.catalogue import HashingStopped, catalogue_of
from tests.weights.models import CARD, contents, tensors, whole_catalogue, write_file, write_model


def test_the_same_model_cut_into_other_files_is_the_same_model(tmp_path):
    one = whole_catalogue(write_model(tmp_path / "one"), tmp_path / "kept")
    three = whole_catalogue(write_model(tmp_path / "three", files=3), tmp_path / "kept")
    assert one.id == three.id and one.encoded == three.encoded
    assert one.places != three.places


def test_one_other_byte_is_another_model(tmp_path):
    directory = write_model(tmp_path / "one")
    before = whole_catalogue(directory, tmp_path / "kept").id
    path = directory / "model-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert whole_catalogue(directory, tmp_path / "kept").id != before


def test_only_the_text_side_and_tensors_are_told_of_and_no_code(tmp_path):
    manifest = whole_catalogue(write_model(tmp_path / "one"), tmp_path / "kept").manifest
    assert [file.name for file in manifest.files] == ["config.json", "tokenizer.json"]
    assert {tensor.name for tensor in manifest.tensors} == set(tensors())
    assert manifest.agrees_with(CARD)


def test_every_piece_read_is_what_the_manifest_says(tmp_path):
    catalogue = whole_catalogue(write_model(tmp_path / "one", files=2, width=320), tmp_path / "kept")
    read = {}
    for entry in (*catalogue.manifest.files, *catalogue.manifest.tensors):
        pieces = list(pieces_of(entry))
        assert all(piece.matches(catalogue.read(piece.name, piece.number)) for piece in pieces)
        read[entry.name] = b"".join(catalogue.read(piece.name, piece.number) for piece in pieces)
    assert {name: read[name] for name in tensors(320)} == contents(tensors(320))
    assert max(len(each) for each in read.values()) > PIECE_BYTES, "a tensor of several pieces was among them"


@pytest.mark.parametrize(("name", "number"), [("nonsuch", 0), ("config.json", 1), ("config.json", -1), ("config.json", 1 << 60)])
def test_what_is_not_there_is_not_read(tmp_path, name, number):
    assert whole_catalogue(write_model(tmp_path / "one"), tmp_path / "kept").read(name, number) is None


def test_a_file_that_shrank_since_is_told_and_not_padded(tmp_path):
    directory = write_model(tmp_path / "one")
    catalogue = whole_catalogue(directory, tmp_path / "kept")
    (directory / "tokenizer.json").write_text("")
    with pytest.raises(OSError, match="shorter"):
        catalogue.read("tokenizer.json", 0)


def test_hashing_is_done_once_for_files_that_stay_as_they_are(tmp_path, monkeypatch):
    directory = write_model(tmp_path / "one")
    first = whole_catalogue(directory, tmp_path / "kept")

    def never(*args):
        raise AssertionError("hashed again")

    monkeypatch.setattr(module, "_digests", never)
    assert whole_catalogue(directory, tmp_path / "kept").id == first.id
    (directory / "config.json").write_text("{ }")
    with pytest.raises(AssertionError, match="hashed again"):
        whole_catalogue(directory, tmp_path / "kept")


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"\x92\x90\xc4\x01x"])
def test_a_kept_manifest_that_is_damaged_is_made_again(tmp_path, damage):
    directory = write_model(tmp_path / "one")
    first = whole_catalogue(directory, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(damage)
    assert whole_catalogue(directory, tmp_path / "kept").id == first.id


def test_hashing_ends_when_it_is_told_to(tmp_path):
    told = threading.Event()
    told.set()
    with pytest.raises(HashingStopped):
        catalogue_of(write_model(tmp_path / "one"), CARD, tmp_path / "kept", told.is_set)


def test_a_disk_that_keeps_no_manifest_does_not_end_the_node(tmp_path):
    (tmp_path / "file").write_text("")
    assert whole_catalogue(write_model(tmp_path / "one"), tmp_path / "file" / "kept").id


def test_of_weights_that_are_there_twice_the_files_of_the_index_count(tmp_path):
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
def test_a_damaged_file_is_refused(tmp_path, damage):
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


def test_a_tensor_whose_size_is_not_its_shapes_is_not_offered(tmp_path):
    directory = write_model(tmp_path / "one")
    path = directory / "model-0.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1))
    with pytest.raises(BadRequest, match="size"):
        whole_catalogue(directory, tmp_path / "kept")
