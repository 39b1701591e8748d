"""Weights from peers over a network of fakes: real sources and stores, peers that lie, die, lack, refuse and come late."""

import shutil
from collections import namedtuple
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
import trio

from mesh.errors import BadRequest, PeerLost, Refused
from mesh.ids import Address, ModelId, NodeId
from mesh.manifest import PIECE_KIND, WeightPiece
from mesh.view import Facts, ModelCard, Peer, PeerState, Span, View
from mesh.wire.calls import CallReply, Header
from node.weights.catalogue import Catalogue
from node.weights.fetching import FetchedModel, Fetching, announced
from node.weights.source import WeightsSource
from node.weights.store import PulledModel
from tests.weights.models import CARD, content_of, contents, tensors, whole_catalogue, write_model

ME, MODEL = NodeId("me"), ModelId("tiny")
WIDTH = 320


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("whole")
    return whole_catalogue(write_model(folder / "model", files=2, width=WIDTH), folder / "kept")


Fault = Callable[[Header, bytes], bytes]


class Network:
    """Peers by name. `faults`: what a peer does to its answers, `(header, content) -> content`, or raises."""

    def __init__(self, me: NodeId = ME) -> None:
        self.sources: dict[NodeId, WeightsSource] = {}
        self.faults: dict[NodeId, Fault] = {}
        self.asked: list[tuple[NodeId, str]] = []
        self.view = View(me, MappingProxyType({me: Peer(me, "me", ("me", 0))}), 1)
        self._changed = trio.Event()

    def add(
        self, name: NodeId, catalogue: Catalogue, fault: Fault = lambda header, content: content, card: ModelCard = CARD
    ) -> None:
        source = self.sources[name] = WeightsSource(lambda: False)
        source.add(catalogue)
        self.faults[name] = fault
        card = msgspec.structs.replace(card, weights=catalogue.id, manifest=catalogue.id)
        spans = (Span(card.id, 0, card.layers),)
        self.set_peers({**self.view.peers, name: Peer(name, name, (name, 0), facts=Facts(models=(card,), spans=spans))})

    def kill(self, name: NodeId) -> None:
        del self.sources[name]
        peers = {**self.view.peers, name: msgspec_replace(self.view.peers[name], state=PeerState.DEAD)}
        self.set_peers(peers)

    def set_peers(self, peers: dict[NodeId, Peer]) -> None:
        self.view = View(ME, MappingProxyType(peers), self.view.version + 1)
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self, version: int) -> View:
        while self.view.version <= version:
            await self._changed.wait()
        return self.view

    async def call(self, to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0) -> CallReply:
        name = NodeId(to[0])
        if kind == PIECE_KIND:
            self.asked.append((name, str(header["name"])))
        if name not in self.sources:
            raise PeerLost(name, "gone")
        reply, content = await self.sources[name].handlers[kind](ME, header, tail)
        if name not in self.sources:
            raise PeerLost(name, "died in mid-answer")
        return reply, self.faults[name]({**header, "kind": kind}, content)


def msgspec_replace(peer: Peer, **changes: Any) -> Peer:
    return Peer(peer.id, peer.name, peer.address, facts=peer.facts, **changes)


@asynccontextmanager
async def fetching(network: Network, tmp_path: Path) -> AsyncIterator[Fetching]:
    with trio.fail_after(20):
        yield Fetching(lambda: network.view, network.changed, network.call, tmp_path / "weights")


def card_of(view: View, name: ModelId) -> ModelCard:
    card = announced(view, name)
    assert card is not None
    return card


async def text_side(fetching: Fetching) -> FetchedModel:
    """Of what answers to the model's id."""
    return await fetching.text_side(await fetching.wait_for(MODEL))


def came_whole(files: PulledModel) -> bool:
    for name, content in contents(tensors(WIDTH)).items():
        place = files.catalogue.places[name]
        assert place.path.read_bytes()[place.offset :][: len(content)] == content
    return True


async def test_a_model_comes_from_several_peers_at_once(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    for name in map(NodeId, "abc"):
        network.add(name, whole)
    async with fetching(network, tmp_path) as mine:
        fetched = await text_side(mine)
        assert fetched.card.numerics == "" and fetched.card.manifest == whole.id
        assert not list(fetched.files.directory.glob("*.safetensors")), "the text side alone"
        await mine.span(fetched, 0, 3)
    assert came_whole(fetched.files)
    assert {name for name, _ in network.asked} == {"a", "b", "c"}
    assert mine.statistics().lies_total == 0 and mine.statistics().bytes_fetched_total >= sum(
        map(len, contents(tensors(WIDTH)).values())
    )


async def test_only_the_spans_tensors_are_asked_for_and_more_of_them_when_it_grows(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    network.add(NodeId("a"), whole)
    async with fetching(network, tmp_path) as mine:
        fetched = await text_side(mine)
        network.asked.clear()
        await mine.span(fetched, 1, 2)
        assert {name for _, name in network.asked} == {
            "model.layers.1.mlp.weight",
            "model.layers.1.norm.weight",
            "model.norm.weight",
        }
        network.asked.clear()
        await mine.span(fetched, 1, 3)
        assert {name for _, name in network.asked} == {
            "model.layers.2.mlp.weight",
            "model.layers.2.norm.weight",
            "lm_head.weight",
        }
        network.asked.clear()
        await mine.span(fetched, 1, 3)
        assert network.asked == []


def lie(header: Header, content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


async def test_a_peer_that_lies_and_one_that_dies_cost_no_byte(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()

    def die(header: Header, content: bytes) -> bytes:
        if header["kind"] == PIECE_KIND and "layers" in str(header["name"]):
            network.kill(NodeId("dying"))
            raise PeerLost("dying", "gone")
        return content

    network.add(NodeId("dying"), whole, die)
    network.add(NodeId("honest"), whole)
    network.add(NodeId("liar"), whole, lie)
    async with fetching(network, tmp_path) as mine:
        fetched = await text_side(mine)
        await mine.span(fetched, 0, 3)
    assert came_whole(fetched.files)
    assert mine.statistics().lies_total >= 1


async def test_when_all_sources_die_the_rest_comes_from_one_that_joins_later(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()

    def die(header: Header, content: bytes) -> bytes:
        network.kill(NodeId("first"))
        raise PeerLost("first", "gone")

    network.add(NodeId("first"), whole)
    async with fetching(network, tmp_path) as mine, trio.open_nursery() as nursery:
        fetched = await text_side(mine)
        network.faults[NodeId("first")] = die
        nursery.start_soon(mine.span, fetched, 0, 3)
        while "first" in network.sources:
            await trio.sleep(0.01)
        network.add(NodeId("second"), whole)
    assert came_whole(fetched.files)


async def test_after_a_restart_only_what_was_missing_is_fetched(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    network.add(NodeId("a"), whole)
    async with fetching(network, tmp_path) as mine:
        fetched = await text_side(mine)
        (piece, *_) = fetched.files.missing(["model.layers.0.mlp.weight"])
        fetched.files.keep(piece, content_of(whole, piece.name, piece.number))
    network.asked.clear()
    async with fetching(network, tmp_path) as again:
        fetched = await text_side(again)
        assert network.asked == []
        await again.span(fetched, 0, 3)
    assert came_whole(fetched.files)
    assert network.asked.count((NodeId("a"), piece.name)) == sum(name == piece.name for name in _pieces(whole)) - 1


def _pieces(whole: Catalogue) -> list[str]:
    names = []
    for name in tensors(WIDTH):
        number = 0
        while whole.size_bytes(name, number):
            names.append(name)
            number += 1
    return names


async def test_who_holds_a_part_hands_that_part_on(tmp_path: Path, whole: Catalogue) -> None:
    part = PulledModel(tmp_path / "part", whole.manifest)
    for piece in part.missing(["model.layers.0.mlp.weight", "config.json", "tokenizer.json"]):
        part.keep(piece, content_of(whole, piece.name, piece.number))
    network = Network()
    network.add(NodeId("part"), part.catalogue)
    async with fetching(network, tmp_path) as mine, trio.open_nursery() as nursery:
        fetched = await text_side(mine)
        nursery.start_soon(mine.span, fetched, 0, 3)
        while "model.layers.0.mlp.weight" not in fetched.files.catalogue.places:
            await trio.sleep(0.01)
        network.add(NodeId("whole"), whole)
    assert came_whole(fetched.files)
    assert network.sources[NodeId("part")].statistics().pieces_sent_total > 2
    assert network.sources[NodeId("part")].statistics().not_held_total > 0
    assert mine.statistics().lies_total == 0


async def test_a_manifest_that_is_not_what_was_gossiped_is_asked_of_another(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    network.add(
        NodeId("a-liar"), whole, lambda header, content: lie(header, content) if header["kind"] != PIECE_KIND else content
    )
    network.add(NodeId("b"), whole)
    async with fetching(network, tmp_path) as mine:
        assert (await text_side(mine)).files.manifest == whole.manifest


async def test_bytes_that_are_not_the_manifest_that_was_asked_for_are_refused(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    network.add(NodeId("a"), whole, lambda header, content: lie(header, content) if header["kind"] != PIECE_KIND else content)
    async with fetching(network, tmp_path) as mine:
        with pytest.raises(Refused, match="no live peer hands out the files of tiny"):
            await text_side(mine)
        assert not (tmp_path / "weights").exists()


async def test_weights_of_which_the_hash_is_not_known_yet_are_asked_of_nobody(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    async with fetching(network, tmp_path) as mine:
        for weights in ("", "../../etc", "w" * 64):
            with pytest.raises(Refused, match="not known yet"):
                await mine.text_side(msgspec.structs.replace(CARD, weights=weights))


async def test_it_waits_until_a_peer_tells_of_the_model(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    async with fetching(network, tmp_path) as mine, trio.open_nursery() as nursery:
        nursery.start_soon(text_side, mine)
        await trio.testing.wait_all_tasks_blocked()
        network.add(NodeId("a"), whole)
    assert (tmp_path / "weights" / whole.id[:32] / "config.json").exists()


async def test_a_text_side_that_is_here_is_taken_up_with_no_peer_left(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    network.add(NodeId("a"), whole)
    async with fetching(network, tmp_path) as mine:
        card = await mine.wait_for(MODEL)
        await mine.text_side(card)
        network.kill(NodeId("a"))
        assert (await mine.text_side(card)).files.manifest == whole.manifest


async def test_the_version_that_answers_to_the_name_is_fetched_and_others_by_theirs(tmp_path: Path, whole: Catalogue) -> None:
    other = whole_catalogue(write_model(tmp_path / "other", rope=1), tmp_path / "kept")
    network = Network()
    network.add(NodeId("a"), other)
    network.add(NodeId("b"), whole, card=msgspec.structs.replace(CARD, numerics="one machine"))
    network.add(NodeId("c"), whole, card=msgspec.structs.replace(CARD, numerics="another"))
    assert card_of(network.view, MODEL).manifest == whole.id
    assert card_of(network.view, ModelId(f"tiny@{other.id[:8]}")).manifest == other.id
    network.kill(NodeId("c"))
    assert card_of(network.view, MODEL).manifest == min(whole.id, other.id)
    assert announced(network.view, ModelId("nonsuch")) is None
    async with fetching(network, tmp_path) as mine:
        fetched = await mine.text_side(await mine.wait_for(ModelId(f"tiny@{other.id[:12]}")))
        assert (fetched.card.id, fetched.card.weights) == (MODEL, other.id)


async def test_a_peer_that_tells_another_number_of_layers_of_the_same_weights_is_outvoted(
    tmp_path: Path, whole: Catalogue
) -> None:
    network = Network()
    network.add(NodeId("a-wrong"), whole, card=msgspec.structs.replace(CARD, layers=2))
    for name in map(NodeId, "bc"):
        network.add(name, whole)
    assert card_of(network.view, MODEL).layers == CARD.layers


async def test_a_card_whose_manifest_is_not_of_its_weights_is_no_source(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    network.add(NodeId("a"), whole)
    torn = msgspec.structs.replace(network.view.peers[NodeId("a")].facts.models[0], weights="b" * 64)
    facts = msgspec.structs.replace(network.view.peers[NodeId("a")].facts, models=(torn,))
    network.set_peers({**network.view.peers, NodeId("a"): Peer(NodeId("a"), "a", ("a", 0), facts=facts)})
    assert announced(network.view, MODEL) is None


async def test_a_version_whose_holders_hand_nothing_out_is_waited_for_and_no_other_taken(
    tmp_path: Path, whole: Catalogue
) -> None:
    other = whole_catalogue(write_model(tmp_path / "other", rope=1), tmp_path / "kept")
    network = Network()
    network.add(NodeId("a"), other)
    for name in map(NodeId, "bc"):
        network.add(name, whole)
        keeps = msgspec.structs.replace(network.view.peers[name].facts.models[0], manifest="")
        facts = msgspec.structs.replace(network.view.peers[name].facts, models=(keeps,))
        network.set_peers({**network.view.peers, name: Peer(name, name, (name, 0), facts=facts)})
    assert announced(network.view, MODEL) is None


async def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path, whole: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    network.add(NodeId("a"), whole)
    async with fetching(network, tmp_path) as mine:
        fetched = await text_side(mine)
        with pytest.raises(BadRequest, match="make room"):
            with monkeypatch.context() as patch:
                usage = namedtuple("usage", "total used free")
                patch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 20))
                await mine.span(fetched, 0, 3)

        def fails(piece: WeightPiece, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(fetched.files, "keep", fails)
        with pytest.raises(BadRequest, match="No space"):
            await mine.span(fetched, 0, 3)


async def test_a_source_with_too_many_waiting_says_so_and_is_asked_later(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    refusals = iter(range(3))

    def busy(header: Header, content: bytes) -> bytes:
        if header["kind"] == PIECE_KIND and next(refusals, None) is not None:
            raise Refused("busy", 0.05)
        return content

    network.add(NodeId("a"), whole, busy)
    async with fetching(network, tmp_path) as mine:
        fetched = await text_side(mine)
        await mine.span(fetched, 0, 3)
    assert came_whole(fetched.files) and mine.statistics().retries_total == 3


async def test_two_that_need_the_text_side_at_once_share_its_files(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    network.add(NodeId("a"), whole)
    sides = []

    async def fetch(mine: Fetching, card: ModelCard) -> None:
        sides.append(await mine.text_side(card))

    async with fetching(network, tmp_path) as mine:
        card = await mine.wait_for(MODEL)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fetch, mine, card)
    assert len({id(side.files) for side in sides}) == 1
    assert len(network.asked) == len(set(network.asked)) == len(whole.manifest.files), "each piece was asked for once"


async def test_a_text_side_beyond_the_limit_is_refused_before_it_is_fetched(tmp_path: Path, whole: Catalogue) -> None:
    network = Network()
    network.add(NodeId("a"), whole)
    async with fetching(network, tmp_path) as mine:
        card = await mine.wait_for(MODEL)
        with pytest.raises(BadRequest, match="10 are allowed"):
            await mine.text_side(card, 10)
        assert network.asked == []
        assert (await mine.text_side(card, 1 << 20)).files.manifest == whole.manifest
