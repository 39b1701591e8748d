"""What came from peers, on the disk: checked before it counts, kept over restarts, never taken for what has not come."""

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.errors import BadRequest
from mesh.manifest import WeightPiece
from node.checkpoints.safetensors_header import INDEX, read_header, weight_files
from node.weights.catalogue import Catalogue
from node.weights.store import MANIFEST, MARK, PART, PulledModel, WrongPiece
from tests.weights.models import content_of, contents, tensors, whole_catalogue, write_model

WIDTH = 320  # the layers' matrices take more than a piece


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("whole")
    return whole_catalogue(write_model(folder / "model", files=2, width=WIDTH), folder / "kept")


def pull(files: PulledModel, whole: Catalogue, pieces: Iterable[WeightPiece]) -> None:
    for piece in pieces:
        files.keep(piece, content_of(whole, piece.name, piece.number))


def stored(directory: Path) -> dict[str, Path]:
    return {name: path for path in weight_files(directory) for name in read_header(path)}


def test_what_was_pulled_is_the_model_bit_for_bit_and_can_be_handed_on(tmp_path: Path, whole: Catalogue) -> None:
    files = PulledModel(tmp_path / "model", whole.manifest)
    pull(files, whole, files.missing([*tensors(WIDTH), "config.json", "tokenizer.json"]))
    assert files.missing(tensors(WIDTH)) == []
    for name, content in contents(tensors(WIDTH)).items():
        path = stored(tmp_path / "model")[name]
        header = read_header(path)[name]
        assert path.read_bytes()[header.offset :][: header.size_bytes] == content
        assert header.offset % 2 == 0 and (header.dtype != "F32" or header.offset % 4 == 0), "loaders need them aligned"
    assert files.catalogue.id == whole.id
    assert files.catalogue.read("model.layers.1.mlp.weight", 1) == whole.read("model.layers.1.mlp.weight", 1)
    assert json.loads((tmp_path / "model" / MARK).read_text())["manifest"] == whole.id
    assert PulledModel.at(tmp_path / "model").catalogue.id == whole.id


def test_a_loader_sees_only_what_has_come_whole(tmp_path: Path, whole: Catalogue) -> None:
    files = PulledModel(tmp_path / "model", whole.manifest)
    pieces = files.missing(["model.layers.0.mlp.weight", "model.layers.1.mlp.weight"])
    of_first = [piece for piece in pieces if "layers.0" in piece.name]
    pull(files, whole, [*of_first, *[piece for piece in pieces if "layers.1" in piece.name][:-1]])
    here = {"model.layers.0.mlp.weight", "model.layers.0.norm.weight"}
    assert set(stored(tmp_path / "model")) == here
    assert set(json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]) == here
    assert files.catalogue.read("model.layers.1.mlp.weight", 0) is None, "what has not come whole is handed to nobody"
    assert [path.name for path in (tmp_path / "model").glob(f"*{PART}")] == [f"layer-00001.safetensors{PART}"]


def test_a_wrong_piece_is_not_written(tmp_path: Path, whole: Catalogue) -> None:
    files = PulledModel(tmp_path / "model", whole.manifest)
    (piece,) = files.missing(["config.json"])
    right = content_of(whole, "config.json", 0)
    for wrong in (b"", right[:-1], right + b" ", right.replace(b"40", b"41")):
        with pytest.raises(WrongPiece):
            files.keep(piece, wrong)
    assert not (tmp_path / "model" / "config.json").exists()
    files.keep(piece, right)
    files.keep(piece, right)
    assert (tmp_path / "model" / "config.json").read_bytes() == right


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_after_any_restart_and_any_damage_to_a_part_only_the_right_bytes_count(
    tmp_path: Path, whole: Catalogue, data: st.DataObject
) -> None:
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    names = ["model.layers.0.mlp.weight", "model.embed_tokens.weight", "tokenizer.json"]
    for _ in range(data.draw(st.integers(1, 4))):
        files = PulledModel(tmp_path / "model", whole.manifest)
        pieces = files.missing(names)
        pull(files, whole, pieces[: data.draw(st.integers(0, len(pieces)))])
        for part in sorted((tmp_path / "model").glob(f"*{PART}")):
            damage = data.draw(st.sampled_from(["none", "byte", "shorter", "gone"]))
            content = bytearray(part.read_bytes())
            if damage == "byte":
                content[data.draw(st.integers(0, len(content) - 1))] ^= 0x55
                part.write_bytes(content)
            elif damage == "shorter":
                part.write_bytes(content[:-1])
            elif damage == "gone":
                part.unlink()
    files = PulledModel(tmp_path / "model", whole.manifest)
    pull(files, whole, files.missing(names))
    assert files.missing(names) == []
    for name in names:
        place = files.catalogue.places[name]
        expected = b"".join(iter_pieces(whole, name))
        assert place.path.read_bytes()[place.offset :][: len(expected)] == expected
    for path in weight_files(tmp_path / "model"):
        read_header(path)


def iter_pieces(whole: Catalogue, name: str) -> Iterator[bytes]:
    number = 0
    while (content := whole.read(name, number)) is not None:
        yield content
        number += 1


def test_what_is_kept_is_not_asked_for_again_after_a_restart(tmp_path: Path, whole: Catalogue) -> None:
    files = PulledModel(tmp_path / "model", whole.manifest)
    pieces = files.missing(["model.layers.0.mlp.weight"])
    pull(files, whole, pieces[:-1])
    assert PulledModel(tmp_path / "model", whole.manifest).missing(["model.layers.0.mlp.weight"]) == [pieces[-1]]


def test_the_room_on_the_disk_is_looked_at_before_anything_is_fetched(
    tmp_path: Path, whole: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 257 << 20))
    files = PulledModel(tmp_path / "model", whole.manifest)
    assert files.missing(["config.json"])
    with pytest.raises(BadRequest, match="make room"):
        files.missing(tensors(WIDTH))
    assert not list((tmp_path / "model").glob("layer-*"))


def complete(directory: Path, whole: Catalogue) -> PulledModel:
    files = PulledModel(directory, whole.manifest)
    pull(files, whole, files.missing([*tensors(WIDTH), "config.json", "tokenizer.json"]))
    return files


def test_a_complete_file_that_looks_otherwise_after_a_restart_is_checked_and_mended(tmp_path: Path, whole: Catalogue) -> None:
    complete(tmp_path / "model", whole)
    path = tmp_path / "model" / "layer-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = PulledModel(tmp_path / "model", whole.manifest)
    assert "model.layers.1.mlp.weight" not in again.catalogue.places, "nothing of it is served or handed on"
    pieces = again.missing(["model.layers.1.mlp.weight"])
    assert len(pieces) == 1, "the one that is wrong"
    pull(again, whole, pieces)
    assert again.differs() is None
    assert PulledModel(tmp_path / "model", whole.manifest).missing(tensors(WIDTH)) == []


def test_a_complete_file_that_was_only_touched_is_hashed_and_kept(tmp_path: Path, whole: Catalogue) -> None:
    complete(tmp_path / "model", whole)
    os.utime(tmp_path / "model" / "layer-00001.safetensors", ns=(5, 5))
    assert PulledModel(tmp_path / "model", whole.manifest).missing(tensors(WIDTH)) == []


def test_a_file_that_changes_while_it_is_served_is_told_and_can_be_set_aside(tmp_path: Path, whole: Catalogue) -> None:
    files = complete(tmp_path / "model", whole)
    assert files.differs() is None
    (tmp_path / "model" / "config.json").write_text("{}")
    assert files.differs() == ("config.json", True)
    files.set_aside("config.json")
    assert files.differs() is None and "config.json" not in files.catalogue.places
    assert [piece.name for piece in files.missing(["config.json"])] == ["config.json"]
    (tmp_path / "model" / "layer-00000.safetensors").unlink()
    assert files.differs() == ("layer-00000.safetensors", False)
    files.set_aside("layer-00000.safetensors")
    assert {piece.name for piece in files.missing(tensors(WIDTH))} == {name for name in tensors(WIDTH) if "layers.0" in name}


@pytest.mark.parametrize("damage", ["no mark", "no manifest", "another manifest", "an earlier form"])
def test_files_from_peers_of_which_the_model_cannot_be_told_are_refused(tmp_path: Path, whole: Catalogue, damage: str) -> None:
    complete(tmp_path / "model", whole)
    mark, manifest = tmp_path / "model" / MARK, tmp_path / "model" / MANIFEST
    match damage:
        case "no mark":
            mark.write_text("{")
        case "no manifest":
            manifest.unlink()
        case "another manifest":
            manifest.write_bytes(manifest.read_bytes() + b"\0")
        case "an earlier form":
            mark.write_text(json.dumps({"manifest": "a" * 64, "weights": "b" * 16}))
    with pytest.raises(BadRequest, match="--model ID"):
        PulledModel.at(tmp_path / "model")


def test_templates_in_their_folder_come_too(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "one")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    whole = whole_catalogue(directory, tmp_path / "kept")
    files = PulledModel(tmp_path / "model", whole.manifest)
    pull(files, whole, files.missing(["additional_chat_templates/tool_use.jinja"]))
    assert (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert PulledModel(tmp_path / "model", whole.manifest).missing(["additional_chat_templates/tool_use.jinja"]) == []
