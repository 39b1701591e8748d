"""What a node takes before it runs: its configuration, identity, sockets and models."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import BadRequest
from mesh.ids import ModelId
from mesh.view import Facts, ModelCard, Span
from node.checkpoints.capacity import layers_that_fit, needed_mib, parameters
from node.config import NodeConfig, pinned_spans
from node.host.identity import take_free_identity, take_identity
from node.host.sockets import open_listener, open_peer_sockets, reachable
from node.serving.models import ServedModels, parse_reference
from node.serving.own_facts import OwnFacts


@pytest.mark.parametrize(("layers", "spans"), [("auto", None), ("none", ()), ("0:4", ((0, 4),)), ("0:2,4:6", ((0, 2), (4, 6)))])
def test_layers_are_pinned_left_out_or_chosen(layers: str, spans: tuple[tuple[int, int], ...] | None) -> None:
    assert pinned_spans(layers) == spans


@pytest.mark.parametrize("layers", ["", "4", "4:2", "a:b", "0:2,", "-1:2", "1:1", "0:²"])
def test_other_forms_of_layers_are_refused_with_the_right_ones(layers: str) -> None:
    with pytest.raises(BadRequest, match="A:B"):
        NodeConfig(layers=layers)


def test_weights_are_quantised_to_known_widths_only() -> None:
    with pytest.raises(BadRequest, match="none, int8 or int4"):
        NodeConfig(quantize="int2")


@pytest.mark.parametrize("workers", [0, -1, 65])
def test_a_senseless_number_of_workers_is_refused(workers: int) -> None:
    with pytest.raises(BadRequest, match="--tensor-parallel: expected 1 to 64 workers"):
        NodeConfig(tensor_parallel=workers)


def test_listening_beyond_loopback_needs_keys(tmp_path: Path) -> None:
    refused: list[dict[str, Any]] = [{"bind": (host, 1)} for host in ("0.0.0.0", "::", "127.example.org")]
    for bad in [*refused, {"http": ("10.0.0.1", 1)}]:
        with pytest.raises(BadRequest, match="key"):
            NodeConfig(**bad)
    NodeConfig(bind=("127.0.0.9", 1), http=("::1", 2))
    NodeConfig(bind=("0.0.0.0", 1), key_file=tmp_path)
    NodeConfig(http=("0.0.0.0", 1), key_file=tmp_path)
    with pytest.raises(BadRequest, match="mesh key new"):
        NodeConfig(http=("0.0.0.0", 1), api_key_file=tmp_path)


@pytest.mark.parametrize("given", [{"name": "n" * 33}, {"name": "ü" * 17}, {"region": "r" * 17}])
def test_a_description_that_could_not_spread_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="bytes"):
        NodeConfig(**given)


def test_an_identity_is_for_life_and_each_start_counts(tmp_path: Path) -> None:
    first = take_identity(tmp_path)
    first.lock.close()
    second = take_identity(tmp_path)

    assert (first.epoch, second.epoch) == (1, 2)
    assert first.id == second.id and len(first.id) == 16
    second.renew(9)
    second.lock.close()
    third = take_identity(tmp_path)
    assert third.epoch == 10
    third.lock.close()


def test_a_new_identity_takes_the_place_of_a_copied_one_and_stays(tmp_path: Path) -> None:
    first = take_identity(tmp_path / "first")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "node.json").write_bytes((tmp_path / "first" / "node.json").read_bytes())
    (tmp_path / "copy" / "node.json").chmod(0o600)
    (tmp_path / "copy" / "documents").mkdir()
    new = take_identity(tmp_path / "copy", new=True)
    assert new.id != first.id and new.epoch == 1 and (tmp_path / "copy" / "documents").is_dir()
    new.lock.close()
    again = take_identity(tmp_path / "copy")
    assert again.id == new.id
    with pytest.raises(BadRequest, match="another running node"):
        take_identity(tmp_path / "first", new=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "node.json").write_text("{")
    mended = take_identity(tmp_path / "damaged", new=True)
    assert mended.epoch == 1
    for held in (first, again, mended):
        held.lock.close()


def test_a_full_disk_at_a_new_epoch_does_not_end_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = take_identity(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        held.renew(9)
    held.lock.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "node.json"], "a temporary file was left behind"
    again = take_identity(tmp_path)
    assert (again.id, again.epoch) == (held.id, 2)
    again.lock.close()


def test_one_data_directory_serves_one_running_node(tmp_path: Path) -> None:
    held = take_identity(tmp_path)
    with pytest.raises(BadRequest, match="another running node"):
        take_identity(tmp_path)
    held.lock.close()


def test_nodes_started_alike_take_directories_of_their_own(tmp_path: Path) -> None:
    first, second = take_free_identity(tmp_path), take_free_identity(tmp_path)
    assert first.id != second.id and first.directory != second.directory
    first.lock.close()
    second.lock.close()


@pytest.mark.parametrize("content", ["", "{", '{"id": "x", "epoch": 1}', '{"id": "0123456789abcdef", "epoch": -1}'])
def test_a_damaged_identity_is_told_and_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "node.json").write_text(content)
    with pytest.raises(BadRequest, match="node"):
        take_identity(tmp_path)
    assert (tmp_path / "node.json").read_text() == content


async def test_gossip_and_links_share_one_free_port() -> None:
    sockets = await open_peer_sockets(("127.0.0.1", 0))
    try:
        assert sockets.datagrams.getsockname()[:2] == sockets.listener.socket.getsockname()[:2] == sockets.address
        with pytest.raises(BadRequest, match="in use"):
            await open_peer_sockets(sockets.address)
        with pytest.raises(BadRequest, match="--http"):
            await open_listener(sockets.address, "--http")
    finally:
        sockets.datagrams.close()
        await sockets.listener.aclose()


async def test_a_node_that_listens_everywhere_tells_an_address_that_others_can_use() -> None:
    assert await reachable(("127.0.0.5", 7)) == ("127.0.0.5", 7)
    assert await reachable(("0.0.0.0", 7), [("no..body", 1), ("127.0.0.1", 9)]) == ("127.0.0.1", 7)
    assert await reachable(("::", 7), [("::1", 9)]) == ("::1", 7)
    assert (await reachable(("0.0.0.0", 7)))[0] != "0.0.0.0"


def safetensors(path: Path, tensors: dict[str, list[int]]) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def test_capacity_is_counted_from_headers(tmp_path: Path) -> None:
    safetensors(tmp_path / "a.safetensors", {"x": [1000, 1000], "y": [500_000]})
    safetensors(tmp_path / "b.safetensors", {"z": [1_500_000]})

    assert parameters(tmp_path) == 3_000_000
    per_layer = 3_000_000 * 4 * 1.25 / 6
    assert layers_that_fit(tmp_path, 6, int(4 * per_layer / 0.75) + 1) == 4
    assert layers_that_fit(tmp_path, 6, 1 << 40) == 6
    assert layers_that_fit(tmp_path, 6, 1 << 20) == 0


def test_model_references_name_a_directory_or_give_it_a_name(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    assert parse_reference(str(tmp_path / "llama")) == ("llama", tmp_path / "llama")
    assert parse_reference(f"small={tmp_path / 'llama'}") == ("small", tmp_path / "llama")
    with pytest.raises(BadRequest, match="save_pretrained"):
        parse_reference("org/name")


@pytest.mark.parametrize(
    ("path", "id"),
    [
        ("hub/models--org--tiny-llama/snapshots/4f3c0d", "org/tiny-llama"),
        ("hub/models--gpt2/snapshots/4f3c0d/", "gpt2"),
        ("hub/models--org--tiny/snapshots/../snapshots/4f3c0d", "org/tiny"),
        ("snapshots/4f3c0d", "4f3c0d"),
        ("a=b/tiny", "tiny"),
        ("link", "link"),  # a link is called what a person called it, wherever it leads
    ],
)
def test_a_snapshot_in_the_hub_cache_is_called_as_on_the_hub(tmp_path: Path, path: str, id: str) -> None:
    (tmp_path / "hub/models--org--tiny/snapshots").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "hub/models--org--tiny/snapshots", target_is_directory=True)
    (tmp_path / path).mkdir(parents=True, exist_ok=True)
    assert parse_reference(str(tmp_path / path))[0] == id
    assert parse_reference(f"mine={tmp_path / path}")[0] == "mine"


def test_the_directory_that_a_node_is_started_in_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert parse_reference(".")[0] == "tiny"


def test_an_unknown_model_is_404_and_names_the_known() -> None:
    with pytest.raises(BadRequest, match="known: none") as unknown:
        ServedModels().get(ModelId("x"))
    assert (unknown.value.status, unknown.value.code, unknown.value.param) == (404, "model_not_found", "model")


def test_facts_go_out_once_for_each_change() -> None:
    sent: list[Facts] = []
    facts = OwnFacts(Facts(), sent.append)
    card, span = ModelCard(ModelId("m"), 6, 100, "w", ""), Span(ModelId("m"), 0, 3)
    facts.set_model(card, 4)
    facts.set_intended((span,))
    facts.set_serving(card, (span,))
    facts.set_serving(card, (span,))

    assert [fact.intends for fact in sent] == [(), (span,), ()]
    assert facts.now.spans == (span,) and facts.now.capacity == {"m": 4}
    facts.set_uncompiled("no C compiler")
    facts.set_uncompiled("no C compiler")
    assert [fact.uncompiled for fact in sent] == ["", "", "", "no C compiler"]
    facts.set_model(ModelCard(ModelId("pinned"), 2, 100, "w", ""), None)
    assert "pinned" not in facts.now.capacity


def test_a_name_without_a_directory_is_refused_and_not_taken_for_this_one() -> None:
    with pytest.raises(BadRequest, match="expected NAME=DIR, got no directory"):
        parse_reference("small=")


def test_the_memory_that_is_named_for_a_model_that_does_not_fit_holds_it(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", {"weight": [64 << 10, 1024]})
    needed = needed_mib(tmp_path, models=2)
    assert layers_that_fit(tmp_path, 14, (needed << 20) // 2) == 14
    assert layers_that_fit(tmp_path, 14, (needed << 19) // 2) < 14
