"""Files that change under a node: nothing is served under a name that it has not got any more."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from mesh.errors import BadRequest
from mesh.ids import ModelId, NodeId
from mesh.view import Facts, ModelCard, Span, View
from node.engine.api import SpanLost
from node.serving.library import ModelLibrary
from node.serving.models import InitialModels, ServedModel, ServedModels, split_references
from node.serving.own_facts import OwnFacts
from node.serving.placement import Placement
from node.text.tokenizer import ModelText
from node.weights.identity import identity_of
from tests.weights.models import LAYERS, write_model

TINY = ModelId("tiny")
WHOLE = Span(TINY, 0, LAYERS)


class RecordingEngine:
    """Loads nothing; records the weights of each load."""

    def __init__(self) -> None:
        self.loaded: list[tuple[Span, str]] = []
        self.unloaded: list[Span] = []
        self.while_loading: Callable[[], None] = lambda: None
        self.refuses: BadRequest | None = None

    def inspect(self, directory: Path, model: ModelId) -> ModelCard:
        if self.refuses is not None:
            raise self.refuses
        return ModelCard(model, LAYERS, 64, "", "")

    def load(self, directory: Path, model: ModelId, start: int, end: int, weights: str) -> ModelCard:
        self.loaded.append((Span(model, start, end), weights))
        self.while_loading()
        return ModelCard(model, LAYERS, 64, weights, "numerics of " + weights[:8])

    def unload(self, span: Span) -> None:
        self.unloaded.append(span)

    def statistics(self) -> None: ...


class Running:
    """A node pinned to all layers of a real directory, with a real library."""

    def __init__(self, directory: Path, folder: Path) -> None:
        self.directory = directory
        self.engine: Any = RecordingEngine()
        self.published: list[Facts] = []
        self.facts = OwnFacts(Facts(), self.published.append)
        self.models = ServedModels()
        text: Any = None
        self.models.add(ServedModel(ModelCard(TINY, LAYERS, 64, "", ""), directory, text))
        view = View(NodeId("me"))
        self.library = ModelLibrary(lambda: view, never_asked, never_asked, folder, lambda: False)
        membership: Any = None
        holdings = InitialModels(self.models, {TINY: LAYERS}, (), 1 << 30)
        engine: Any = self.engine
        self.placement = Placement(f"0:{LAYERS}", engine, holdings, self.facts, membership, self.library)

    def serves(self) -> str:
        """The weights in service; empty: none."""
        return self.facts.now.models[0].weights if self.facts.now.spans == (WHOLE,) else ""

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(30):
            while not condition():
                await trio.sleep(0.005)

    def check_published(self) -> None:
        """Checks all published facts: a span in service has weights, and they have been loaded."""
        loaded = {weights for _, weights in self.engine.loaded}
        for facts in self.published:
            assert not facts.spans or facts.models[0].weights in loaded, "nothing is served before its weights are known"


async def never_asked(*_: object, **__: object) -> Any:
    raise AssertionError("no peer is asked")


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    node = Running(tmp_path / "model", tmp_path / "own")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.placement.run)
        yield node
        node.check_published()
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model on the disk, no tokenizer, and no long waits."""
    write_model(tmp_path / "model", files=2)
    monkeypatch.setattr(ModelText, "load", classmethod(lambda cls, directory: None))
    monkeypatch.setattr("node.weights.verifying.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("node.serving.placement.RENEW_EVERY_S", 0.01)


def flip_unseen(path: Path) -> None:
    """Another byte; size, time and inode as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_the_weights_are_published_before_anything_is_loaded(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await node.until(node.serves)
        weights = identity_of(node.directory)
        assert node.serves() == weights
        assert node.engine.loaded == [(WHOLE, weights)]
        first = node.published[0].models[0]
        assert (first.weights, node.published[0].spans) == ("", ()), "at first only the model, without weights"
        card = node.facts.now.models[0]
        assert (card.manifest, card.numerics) == (weights, "numerics of " + weights[:8]) and card.written_at_s


async def test_a_model_whose_file_is_written_is_hashed_again_before_it_serves(tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with running(tmp_path) as node:
            await node.until(node.serves)
            before = node.serves()
            (node.directory / "config.json").write_text('{"vocab_size": 40, "other": 1}')
            await node.until(lambda: node.serves() not in ("", before))
            assert node.serves() == identity_of(node.directory)
            assert node.engine.unloaded == [WHOLE]
            assert [weights for _, weights in node.engine.loaded] == [before, node.serves()]
            between = [facts for facts in node.published if not facts.models[0].weights and facts.intends]
            assert between and not any(facts.spans for facts in between), "meanwhile the spans are published as intended"
            assert TINY in node.library.faults
    [line] = [each for each in logs if each["event"] == "weights.changed"]
    assert (line["log_level"], line["file"], line["weights"]) == ("error", "config.json", before[:16])


async def test_a_flipped_byte_is_found_after_a_start_from_the_record(tmp_path: Path) -> None:
    weights = identity_of(tmp_path / "model")
    flip_unseen(tmp_path / "model" / "model-1.safetensors")
    async with running(tmp_path) as node:
        await node.until(lambda: node.serves() not in ("", weights))
        assert next(loaded for _, loaded in node.engine.loaded) == weights, "the record was used at the start"
        assert "other bytes than were hashed" in node.library.faults[TINY]
        assert len(node.engine.loaded) == 2
        assert node.serves() == identity_of(node.directory), "the record has been mended"
        (node.directory / ".mesh-manifest").unlink()
        assert node.serves() == identity_of(node.directory)


def replaced(path: Path, content: str) -> None:
    path.with_name("new").write_text(content)
    path.with_name("new").replace(path)


@pytest.mark.parametrize("how", ["replaced", "removed"])
async def test_loaded_layers_are_served_on_when_their_files_are_replaced(tmp_path: Path, how: str) -> None:
    with capture_logs() as logs:
        async with running(tmp_path) as node:
            await node.until(node.serves)
            before = node.serves()
            if how == "replaced":
                replaced(node.directory / "config.json", '{"vocab_size": 40, "other": 1}')
            else:
                (node.directory / "model-0.safetensors").unlink()
            await node.until(lambda: [line for line in logs if line["event"] == "weights.replaced"])
            assert node.serves() == before and node.engine.unloaded == []
            card = node.facts.now.models[0]
            assert card.manifest == "" and TINY not in node.facts.now.capacity, "no peer gets them, and no move counts on them"
            with pytest.raises(BadRequest, match="not here"):
                await node.library.handlers["weights.manifest"](NodeId("peer"), {"manifest": before, "offset": 0}, b"")
            assert "served on until this node is started again" in node.library.faults[TINY]


async def test_a_span_lost_after_its_files_were_replaced_has_the_new_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.serving.placement.RELOAD_AFTER_S", 0.01)
    with capture_logs() as logs:
        async with running(tmp_path) as node:
            await node.until(node.serves)
            before = node.serves()
            replaced(node.directory / "config.json", '{"vocab_size": 40, "other": 1}')
            await node.until(lambda: [line for line in logs if line["event"] == "weights.replaced"])
            node.placement.span_lost(SpanLost(WHOLE, "its workers ended"))
            await node.until(node.serves)
            assert node.serves() == identity_of(node.directory) != before
            assert node.facts.now.models[0].manifest == node.serves()
            assert [weights for _, weights in node.engine.loaded] == [before, node.serves()], "nothing of the old under the new"


async def test_layers_from_files_that_changed_during_the_load_are_not_served(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        before = identity_of(node.directory)

        def write_once() -> None:
            node.engine.while_loading = lambda: None
            (node.directory / "tokenizer.json").write_text("other")

        node.engine.while_loading = write_once
        await node.until(node.serves)
        assert node.serves() == identity_of(node.directory) != before
        assert all(facts.models[0].weights != before for facts in node.published if facts.spans)
        assert node.engine.unloaded == [WHOLE]


async def test_files_that_cannot_be_served_any_more_are_waited_for(tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with running(tmp_path) as node:
            await node.until(node.serves)
            before = node.serves()
            original = (node.directory / "config.json").read_text()
            node.engine.refuses = BadRequest("the config cannot be read")
            (node.directory / "config.json").write_text("{")
            await node.until(lambda: [line for line in logs if line["event"] == "weights.not_served"])
            assert node.serves() == "" and node.facts.now.spans == ()
            node.engine.refuses = None
            (node.directory / "config.json").write_text(original)
            await node.until(node.serves)
            assert node.serves() == before
    assert "the config cannot be read" in next(line["why"] for line in logs if line["event"] == "weights.not_served")


async def test_damaged_files_at_the_start_end_the_node_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "model" / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    node = Running(tmp_path / "model", tmp_path / "own")
    with pytest.raises(BadRequest, match="download it again"):
        await node.placement.run()


def test_two_models_under_one_name_on_one_node_are_refused(tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    for references in ([f"a={other}", f"a={tmp_path / 'model'}"], [f"a={other}", "a"]):
        with pytest.raises(BadRequest, match="a is given twice"):
            split_references(references, joins=True)
    here, wanted = split_references([f"a={other}", f"b={other}", "c"], joins=True)
    assert ([name for name, _ in here], wanted) == (["a", "b"], ["c"])
