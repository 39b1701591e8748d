"""Any node answers for a model that only peers hold: it fetches tokenizer and template, once, when a request names the model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from mesh.client.flow import SILENCE_S
from mesh.errors import BadRequest, ModelLoading, NoPath, Refused
from mesh.ids import ModelId, NodeId
from mesh.view import Facts, ModelCard, Peer, Span
from node.engine.default_model import DIRECTORY, LAYERS
from node.serving.library import ModelLibrary
from node.serving.models import ServedModel, ServedModels
from node.serving.peer_models import MAX_MODELS, WAIT_S, PeerModels
from node.text.tokenizer import ModelText
from node.weights.catalogue import Catalogue, identify
from node.weights.hashing import HashingProgress
from tests.weights.test_fetching import ME, Network

CARD = ModelCard(ModelId("second"), LAYERS, 2048, "", "n")


def catalogue_of(directory: Path, folder: Path) -> Catalogue:
    return identify(directory, folder, HashingProgress()).catalogue


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_of(DIRECTORY, tmp_path_factory.mktemp("kept"))


class Mesh:
    """This node, with models of its own or none, and peers on a network of fakes."""

    def __init__(self, folder: Path) -> None:
        self.network: Any = Network()
        self.own = ServedModels()
        library = ModelLibrary(lambda: self.network.view, self.network.changed, self.network.call, folder, lambda: False)
        self.library = library
        self.models = PeerModels(lambda: self.network.view, self.own, library)

    def peer_serves(self, name: str, catalogue: Catalogue, card: ModelCard = CARD, spans: tuple[Span, ...] | None = None) -> None:
        self.network.add(name, catalogue, card=card)
        peer = self.network.view.peers[name]
        held = (Span(card.id, 0, card.layers),) if spans is None else spans
        facts = msgspec.structs.replace(peer.facts, spans=held)
        self.replace(Peer(peer.id, name, peer.address, facts=facts))

    def replace(self, peer: Peer) -> None:
        self.network.set_peers({**self.network.view.peers, peer.id: peer})


@pytest.fixture
def mesh(tmp_path: Path) -> Mesh:
    return Mesh(tmp_path)


@asynccontextmanager
async def running(mesh: Mesh) -> AsyncIterator[PeerModels]:
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.models.run)
        yield mesh.models
        nursery.cancel_scope.cancel()


async def test_a_model_of_peers_is_found_with_its_tokenizer_and_fetched_once(mesh: Mesh, catalogue: Catalogue) -> None:
    mesh.peer_serves("a", catalogue)
    async with running(mesh) as models:
        assert models.complete() == [CARD.id]
        found: list[ServedModel] = []

        async def ask(model: ModelId | None) -> None:
            found.append(await models.get(model))

        async with trio.open_nursery() as nursery:
            for model in (CARD.id, CARD.id, None):
                nursery.start_soon(ask, model)
        asked = list(mesh.network.asked)
        found.append(await models.get(CARD.id))
    assert len({id(each) for each in found}) == 1, "all share what was fetched and read once"
    own = ModelText.load(DIRECTORY)
    talk = [{"role": "user", "content": "Hello"}]
    assert found[0].text.encode_chat(talk) == own.encode_chat(talk)
    assert found[0].text.sampling_defaults == own.sampling_defaults == {"temperature": 0.0}
    names = [name for _, name in asked]
    assert mesh.network.asked == asked and len(names) == len(set(names)), "nothing is fetched twice"
    assert {"tokenizer.json", "config.json"} <= set(names) and not any("layers" in name for name in names), "no weights"


async def test_a_nodes_own_models_go_before_those_of_peers(mesh: Mesh, catalogue: Catalogue) -> None:
    mesh.peer_serves("a", catalogue)
    text: Any = None
    own = ServedModel(msgspec.structs.replace(CARD, id=ModelId("zeta")), DIRECTORY, text)
    mesh.own.add(own)
    me = mesh.network.view.peers[ME]
    facts = Facts(spans=(Span(own.card.id, 0, LAYERS),), models=(own.card,))
    mesh.replace(Peer(NodeId(ME), "me", me.address, facts=facts))
    async with running(mesh) as models:
        assert models.complete() == ["zeta", "second"]
        assert await models.get(None) is own and await models.get(own.card.id) is own
        assert (await models.get(CARD.id)).card.id == "second"


async def test_an_unknown_model_is_refused_with_the_names_of_the_known(mesh: Mesh, catalogue: Catalogue) -> None:
    async with running(mesh) as models:
        with pytest.raises(BadRequest, match="no model is named, and there is none here; known: none") as refused:
            await models.get(None)
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
        mesh.peer_serves("a", catalogue)
        with pytest.raises(BadRequest, match="no model 'other' here; known: second"):
            await models.get(ModelId("other"))
        mesh.network.kill("a")
        with pytest.raises(BadRequest, match="no model 'second'"):
            await models.get(CARD.id)
    assert not mesh.network.asked


async def test_missing_layers_are_reported_before_anything_is_fetched(mesh: Mesh, catalogue: Catalogue) -> None:
    mesh.peer_serves("a", catalogue, spans=(Span(CARD.id, 0, 2),))
    async with running(mesh) as models:
        with pytest.raises(NoPath, match="layers 2:6 of second"):
            await models.get(CARD.id)
    assert not mesh.network.asked


async def test_a_model_whose_files_no_peer_offers_yet_is_waited_for(mesh: Mesh, catalogue: Catalogue) -> None:
    facts = Facts(spans=(Span(CARD.id, 0, LAYERS),), models=(msgspec.structs.replace(CARD, weights=catalogue.id),))
    mesh.replace(Peer(NodeId("a"), "a", ("a", 0), facts=facts))
    async with running(mesh) as models:
        with pytest.raises(ModelLoading, match="second's tokenizer is being fetched from a"):
            await models.get(CARD.id)
        mesh.peer_serves("a", catalogue)
        assert (await models.get(CARD.id)).card.id == CARD.id


async def test_a_request_waits_a_bounded_time_for_a_slow_peer(
    mesh: Mesh, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < WAIT_S < SILENCE_S, "a client that waits longer takes the node for dead"
    monkeypatch.setattr("node.serving.peer_models.WAIT_S", 0.0)
    mesh.peer_serves("a", catalogue)
    call, slow = mesh.network.call, trio.Event()

    async def slowly(to: Any, kind: str, header: Any, tail: bytes = b"", *, timeout_s: float = 10.0) -> Any:
        await slow.wait()
        return await call(to, kind, header, tail, timeout_s=timeout_s)

    monkeypatch.setattr(mesh.library.fetching, "_call", slowly)
    async with running(mesh) as models:
        with pytest.raises(ModelLoading, match="being fetched from a: 0% done"):
            await models.get(CARD.id)
        slow.set()
        monkeypatch.setattr("node.serving.peer_models.WAIT_S", 60.0)
        assert (await models.get(CARD.id)).card.id == CARD.id


async def test_other_files_under_the_same_name_are_fetched_anew(mesh: Mesh, catalogue: Catalogue, tmp_path: Path) -> None:
    mesh.peer_serves("a", catalogue)
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in DIRECTORY.iterdir():
        (changed / file.name).symlink_to(file)
    (changed / "generation_config.json").unlink()
    (changed / "generation_config.json").write_text('{"temperature": 0.5}')
    async with running(mesh) as models:
        assert (await models.get(CARD.id)).text.sampling_defaults == {"temperature": 0.0}
        mesh.network.kill("a")
        mesh.peer_serves("b", catalogue_of(changed, tmp_path / "kept"))
        assert (await models.get(CARD.id)).text.sampling_defaults == {"temperature": 0.5}


async def test_text_files_beyond_the_bound_are_refused_for_a_while(
    mesh: Mesh, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.serving.peer_models.MAX_TEXT_BYTES", 1000)
    mesh.peer_serves("a", catalogue)
    async with running(mesh) as models:
        for _ in range(2):
            with pytest.raises(Refused, match="cannot take requests for second: the text files of second take"):
                await models.get(CARD.id)
    assert not mesh.network.asked


async def test_the_text_sides_requested_last_are_kept(mesh: Mesh, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(fetched: Any) -> ServedModel:
        text: Any = None
        return ServedModel(fetched.card, DIRECTORY, text)

    monkeypatch.setattr(mesh.library, "read", read)
    for number in range(MAX_MODELS + 2):
        mesh.peer_serves(f"p{number}", catalogue, msgspec.structs.replace(CARD, id=ModelId(f"m{number}")))
    async with running(mesh) as models:
        first = await models.get(ModelId("m0"))
        for number in range(1, MAX_MODELS + 2):
            await models.get(ModelId(f"m{number}"))
            assert await models.get(ModelId("m0")) is first
        assert models.texts_kept == MAX_MODELS


# --- several sets of weights under one id


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """The same model with another way to draw tokens."""
    changed = tmp_path_factory.mktemp("changed")
    for file in DIRECTORY.iterdir():
        (changed / file.name).symlink_to(file)
    (changed / "generation_config.json").unlink()
    (changed / "generation_config.json").write_text('{"temperature": 0.5}')
    return catalogue_of(changed, tmp_path_factory.mktemp("kept"))


def holds_own(mesh: Mesh, weights: str) -> ServedModel:
    """This node holds and serves the model in these weights."""
    text: Any = None
    own = ServedModel(msgspec.structs.replace(CARD, weights=weights), DIRECTORY, text)
    mesh.own.add(own)
    me = mesh.network.view.peers[ME]
    facts = Facts(spans=(Span(CARD.id, 0, LAYERS),), models=(own.card,))
    mesh.replace(Peer(NodeId(ME), "me", me.address, facts=facts))
    return own


async def test_where_other_weights_answer_their_own_text_side_is_fetched(
    mesh: Mesh, catalogue: Catalogue, other: Catalogue
) -> None:
    own = holds_own(mesh, catalogue.id)
    async with running(mesh) as models:
        for name in (CARD.id, None, ModelId(f"second@{catalogue.id[:8]}")):
            assert await models.get(name) is own
        for peer in "ab":
            mesh.peer_serves(peer, other)
        for name in (CARD.id, None, ModelId(f"second@{other.id[:10]}")):
            found = await models.get(name)
            assert (found.card.weights, found.text.sampling_defaults) == (other.id, {"temperature": 0.5}), "the right text side"
        assert await models.get(ModelId(f"second@{catalogue.id[:8]}")) is own, "by its hash the node's own still answers"
        assert models.complete() == ["second", f"second@{catalogue.id[:8]}"]
        mesh.network.kill("a")
        mesh.network.kill("b")
        assert await models.get(CARD.id) is own


async def test_weights_without_a_text_side_are_not_replaced_by_others(
    mesh: Mesh, catalogue: Catalogue, other: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.serving.peer_models.WAIT_S", 0.05)
    monkeypatch.setattr("node.serving.peer_models.RETRY_S", 0.01)
    holds_own(mesh, catalogue.id)
    for name in "ab":
        mesh.peer_serves(name, other)
        mesh.network.sources[name].remove(other.id)  # the peer publishes the weights, and does not send them
    async with running(mesh) as models:
        with pytest.raises(ModelLoading, match="second's tokenizer is being fetched from a, b"):
            await models.get(CARD.id)
        monkeypatch.setattr("node.serving.peer_models.WAIT_S", 60.0)
        mesh.network.sources["b"].add(other)
        assert (await models.get(CARD.id)).card.weights == other.id, "asked again until a peer sent them"


@pytest.mark.parametrize("name", ["second@", "second@cccccccc", "second@CCCCCCCC", "other@aaaaaaaa"])
async def test_a_version_that_no_live_node_has_is_refused(mesh: Mesh, catalogue: Catalogue, other: Catalogue, name: str) -> None:
    holds_own(mesh, catalogue.id)
    for peer in "ab":
        mesh.peer_serves(peer, other)
    async with running(mesh) as models:
        with pytest.raises(BadRequest, match=f"known: second, second@{catalogue.id[:8]}") as refused:
            await models.get(ModelId(name))
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


async def test_a_node_that_has_just_started_has_its_own_model(mesh: Mesh) -> None:
    text: Any = None
    own = ServedModel(CARD, DIRECTORY, text)
    mesh.own.add(own)
    async with running(mesh) as models:
        assert await models.get(CARD.id) is own and await models.get(None) is own
        with pytest.raises(BadRequest, match="known: none"):
            await models.get(ModelId("other"))


async def test_missing_layers_of_a_version_are_reported_by_its_name(mesh: Mesh, catalogue: Catalogue, other: Catalogue) -> None:
    holds_own(mesh, catalogue.id)
    mesh.peer_serves("a", other, spans=(Span(CARD.id, 0, 2),))
    async with running(mesh) as models:
        with pytest.raises(NoPath, match=f"layers 2:6 of second@{other.id[:8]}; start one with"):
            await models.get(ModelId(f"second@{other.id[:8]}"))
