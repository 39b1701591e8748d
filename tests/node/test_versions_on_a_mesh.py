"""Two sets of weights under one id on a mesh in one process: a request is answered by one of them, with any losses."""

from __future__ import annotations

import msgspec
import pytest
import trio

from mesh.ids import NodeId
from mesh.versions import versions
from mesh.view import Facts, ModelCard, Peer, Span, View
from node.entry.generation import GenerationPhase
from node.requests import TextDelta
from node.serving.stages import OpenStage
from tests.node.paths import CARD, MODEL, SmallMesh, a_request, small_mesh
from tests.node.test_paths import EXPECTED, run, tokens

OTHER = msgspec.structs.replace(CARD, weights="others")
WHOLE = ((0, 6),)


def of_other_weights(mesh: SmallMesh, *names: str) -> None:
    for name in names:
        mesh.nodes[name].card = OTHER


def opened_on(mesh: SmallMesh, name: str) -> list[str]:
    return [sequence.weights for sequence in mesh.nodes[name].engine.opened]


@pytest.mark.parametrize("policy", ["mesh", "round_robin", "least_connections", "power_of_two"])
async def test_every_policy_sends_a_request_to_its_own_weights_only(policy: str) -> None:
    async with small_mesh(entry=(), a=WHOLE, b=WHOLE, c=((0, 3),), d=((3, 6),)) as mesh:
        of_other_weights(mesh, "b", "c", "d")  # the more nodes: they answer to the id now, and are no replicas of `a`
        for number in range(6):
            assert tokens(await run(mesh, a_request(id=f"s{number}", policy=policy))) == EXPECTED
        assert opened_on(mesh, "a") == [CARD.weights] * 6
        assert not any(opened_on(mesh, name) for name in "bcd")


async def test_a_running_answer_goes_on_with_its_weights_and_never_with_others() -> None:
    async with small_mesh(entry=(), a=WHOLE, b=WHOLE, c=WHOLE, d=WHOLE) as mesh:
        of_other_weights(mesh, "c", "d")

        def kill_the_stage(event: object) -> None:
            if isinstance(event, TextDelta) and event.seq == 5:
                [victim] = [node for node in (mesh.nodes["a"], mesh.nodes["b"]) if node.engine.opened]
                victim.kill()

        events = await run(mesh, each=kill_the_stage)
        assert tokens(events) == EXPECTED and events[-1].attempts == 2
        assert opened_on(mesh, "a") == opened_on(mesh, "b") == [CARD.weights]
        assert opened_on(mesh, "c") == opened_on(mesh, "d") == []


async def test_an_answer_waits_for_its_weights_and_is_not_finished_by_others() -> None:
    async with small_mesh(entry=(), a=WHOLE, c=WHOLE, d=WHOLE) as mesh:
        of_other_weights(mesh, "c", "d")
        events: list[object] = []

        async def ask() -> None:
            def kill_the_stage(event: object) -> None:
                if isinstance(event, TextDelta) and event.seq == 5:
                    mesh.nodes["a"].kill()

            events.extend(await run(mesh, each=kill_the_stage))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while not waits_for_a_path(mesh):
                await trio.sleep(0.01)
            assert opened_on(mesh, "c") == opened_on(mesh, "d") == []
            await mesh.restart("a")
        assert tokens(events) == EXPECTED, "its weights came back"
        assert opened_on(mesh, "c") == opened_on(mesh, "d") == []
        record = mesh.nodes["entry"].entry.recent.find("s1")
        assert record is not None and {each.weights for each in record.why} == {CARD.weights}


def waits_for_a_path(mesh: SmallMesh) -> bool:
    record = mesh.nodes["entry"].entry.recent.find("s1")
    return record is not None and any(core.phase is GenerationPhase.WAITING for core in record.generations.values())


def test_an_open_of_an_earlier_release_without_weights_is_accepted() -> None:
    fields = {name for name in OpenStage.__struct_fields__ if name != "sequence"}
    assert "sequence" in OpenStage.__struct_fields__ and fields
    sequence = {
        "stream": "s", "choice": 0, "attempt": 1, "model": MODEL, "start": 0, "end": 6,
        "prompt_tokens": 1, "known": 1, "tokens": [1], "sampling": {},
    }  # fmt: skip
    encoded = {
        "sequence": sequence, "entry": "e", "previous": None, "last": "l",
        "entry_address": ["h", 1], "first_address": ["h", 1], "next_address": None,
    }  # fmt: skip
    assert msgspec.convert(encoded, OpenStage).sequence.weights == ""
    assert msgspec.convert({**encoded, "sequence": {**sequence, "weights": "w"}}, OpenStage).sequence.weights == "w"


def test_a_card_of_an_earlier_release_is_a_version_of_its_own() -> None:
    encoded = {
        "id": MODEL,
        "layers": 6,
        "max_model_len": 1000,
        "weights": "0123456789abcdef",
        "numerics": "n",
        "manifest": "f" * 64,
    }
    earlier = msgspec.msgpack.decode(msgspec.msgpack.encode(encoded), type=ModelCard)
    now = msgspec.structs.replace(CARD, weights="a" * 64, manifest="a" * 64, written_at_s=5)
    peers = {
        NodeId(name): Peer(NodeId(name), name, ("h", 1), facts=Facts(spans=(Span(MODEL, 0, 6),), models=(card,)))
        for name, card in (("a", earlier), ("b", now), ("c", now))
    }
    seen = View(NodeId("a"), peers)
    assert [version.name for version in versions(seen)] == [MODEL, f"{MODEL}@01234567"]
    assert set(msgspec.to_builtins(now)) - set(encoded) == {"kind", "written_at_s", "whole_only"}, "fields that it ignores"
