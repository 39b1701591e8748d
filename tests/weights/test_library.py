"""A node's own files: which weights they are, what peers may have, and what happens when they change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from mesh.errors import BadRequest
from mesh.ids import ModelId, NodeId
from mesh.view import View
from node.serving import library as module
from node.serving.library import ModelLibrary
from node.serving.models import ServedModel
from node.weights.hashing import HashingProgress
from node.weights.store import PulledModel
from tests.weights.models import CARD, tensors, whole_catalogue, write_model

MODEL = ModelId("tiny")


async def no_call(*_: object, **__: object) -> Any:
    raise AssertionError("no peer is asked")


def library(folder: Path) -> ModelLibrary:
    view = View(NodeId("me"))
    return ModelLibrary(lambda: view, no_call, no_call, folder, lambda: False)


def served(directory: Path) -> ServedModel:
    text: Any = None
    return ServedModel(CARD, directory, text)


async def test_a_directory_is_hashed_and_its_card_says_which_weights_it_holds(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    mine = library(tmp_path / "own")
    model = await mine.identify(served(directory))
    expected = whole_catalogue(directory, tmp_path / "kept").id
    assert (model.card.weights, model.card.manifest) == (expected, expected)
    assert model.card.written_at_s > 0
    reply, _ = await mine.handlers["weights.manifest"](NodeId("peer"), {"manifest": expected, "offset": 0}, b"")
    assert isinstance(size_bytes := reply["size_bytes"], int) and size_bytes > 0, "peers may have it"


async def test_how_far_the_hashing_is_can_be_read_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "model")
    mine = library(tmp_path / "own")
    reached, go_on = trio.Event(), trio.Event()

    def slowly(directory: Path, folder: Path, progress: HashingProgress, *, afresh: bool) -> Any:
        progress.bytes, progress.bytes_done = 4 << 30, 1 << 30
        trio.from_thread.run_sync(reached.set)
        trio.from_thread.run(go_on.wait)
        raise BadRequest("this file is damaged")

    monkeypatch.setattr(module, "identify", slowly)
    with trio.fail_after(20), pytest.RaisesGroup(pytest.RaisesExc(BadRequest, match="damaged")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.identify, served(directory))
            await reached.wait()
            assert mine.hashing() == ["the files of tiny are being hashed, 1.00 of 4.00 GiB"]
            told = mine.statistics().hashing["tiny"]
            assert (told.bytes_done, told.bytes) == (1 << 30, 4 << 30)
            go_on.set()
    assert mine.hashing() == []


async def test_a_node_that_ends_stops_its_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[HashingProgress] = []
    reached = trio.Event()

    def waits(directory: Path, folder: Path, progress: HashingProgress, *, afresh: bool) -> Any:
        begun.append(progress)
        trio.from_thread.run_sync(reached.set)
        assert progress.stop.wait(20)

    monkeypatch.setattr(module, "identify", waits)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(library(tmp_path / "own").identify, served(write_model(tmp_path / "model")))
            await reached.wait()
            nursery.cancel_scope.cancel()
    assert begun[0].stop.is_set()


async def test_files_that_change_are_told_of_handed_on_no_more_and_then_are_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.weights.verifying.LOOK_EVERY_S", 0.01)
    directory = write_model(tmp_path / "model")
    mine = library(tmp_path / "own")
    before = await mine.identify(served(directory))
    assert await mine.is_unchanged(MODEL)
    (directory / "tokenizer.json").write_text("other")
    assert not await mine.is_unchanged(MODEL)
    with trio.fail_after(20):
        change = await mine.changed(MODEL)
    assert change.file == "tokenizer.json"
    await mine.withdraw(MODEL, change)
    assert mine.faults[MODEL].startswith(change.why)
    with pytest.raises(BadRequest, match="not here"):
        await mine.handlers["weights.manifest"](NodeId("peer"), {"manifest": before.card.weights, "offset": 0}, b"")
    after = await mine.identify(before)
    assert after.card.weights != before.card.weights
    assert await mine.is_unchanged(MODEL)


async def test_a_file_that_is_gone_and_a_damaged_index_are_changes_too(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", files=2)
    mine = library(tmp_path / "own")
    await mine.identify(served(directory))
    (directory / "model.safetensors.index.json").write_text("{")
    assert not await mine.is_unchanged(MODEL)
    (directory / "model.safetensors.index.json").unlink()
    assert await mine.is_unchanged(MODEL)
    (directory / "model-1.safetensors").unlink()
    assert not await mine.is_unchanged(MODEL)


async def test_a_file_that_cannot_be_read_is_a_refusal_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "model")

    def unreadable(*_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied", str(directory / "model-0.safetensors"))

    monkeypatch.setattr(module, "identify", unreadable)
    with pytest.raises(BadRequest, match=r"model-0.safetensors cannot be read: Permission denied; check that it is there"):
        await library(tmp_path / "own").identify(served(directory))


async def test_a_model_out_of_the_bounds_for_peers_is_served_and_not_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = library(tmp_path / "own")
    monkeypatch.setattr("node.weights.catalogue.Catalogue.is_fit_for_peers", lambda catalogue: False)
    with capture_logs() as logs:
        model = await mine.identify(served(write_model(tmp_path / "model")))
    assert model.card.weights and not model.card.manifest
    assert "weights.not_offered" in [line["event"] for line in logs]


async def test_a_directory_that_came_from_peers_has_the_weights_of_the_whole_model(tmp_path: Path) -> None:
    whole = whole_catalogue(write_model(tmp_path / "model"), tmp_path / "kept")
    pulled = PulledModel(tmp_path / "pulled", whole.manifest)
    for piece in pulled.missing([*tensors(), "config.json"]):
        pulled.keep(piece, whole.read(piece.name, piece.number) or b"")
    mine = library(tmp_path / "own")
    model = await mine.identify(served(tmp_path / "pulled"))
    assert model.card.weights == whole.id
    path = tmp_path / "pulled" / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert not await mine.is_unchanged(MODEL)
    await mine.withdraw(MODEL, await mine.changed(MODEL))
    assert not path.exists(), "what is not of this model is not loaded"
    again = await mine.identify(replace(model, card=CARD))
    assert again.card.weights == whole.id, "a part of a model is of the model that its mark names"
