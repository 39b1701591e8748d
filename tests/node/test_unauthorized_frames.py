"""Frames of nodes with the mesh key: those about a sequence are accepted from the nodes of its path only, each for its part."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio

from mesh.errors import BadRequest, Refused
from mesh.ids import NodeId, StreamId
from node.engine.api import HiddenOut, SequenceKey
from node.serving.stages import OpenStage
from tests.node.paths import SmallMesh, a_request, small_mesh
from tests.node.test_paths import EXPECTED, at_rest, run, tokens

PATH = {"entry": (), "a": ((0, 3),), "b": ((3, 6),), "stranger": ()}
HELD_AT = 15  # the position whose token the last stage holds back until the test goes on
KEY = SequenceKey(StreamId("s1"), 0, 1)
A_TOKEN: dict[str, Any] = {"tokens": [[*KEY, HELD_AT, 33, None, None, [], 0]]}
THE_LAST_TOKEN: dict[str, Any] = {"tokens": [[*KEY, HELD_AT, 33, "stop", None, [], 0]]}
SOME_ACTIVATIONS = {"rows": [[*KEY, HELD_AT - 1, 1, 1, [], [], 0]]}


class Held:
    """A request that is held in the middle of its answer."""

    def __init__(self, mesh: SmallMesh) -> None:
        self.mesh = mesh
        self.events: list[Any] = []

    def opened(self, name: str) -> OpenStage:
        route = self.mesh.nodes[name].stages.route(KEY)
        assert route is not None
        return route

    def unauthorized_frames(self, name: str) -> int:
        return self.mesh.nodes[name].stages.statistics().foreign_words_total

    async def send(self, sender: str, to: str, kind: str, header: dict[str, Any], tail: bytes = b"") -> None:
        """Sends a frame, and waits until the receiver has counted it as unauthorized."""
        before, node = self.unauthorized_frames(to), self.mesh.nodes[sender]
        node.links.post(self.mesh.nodes[to].links.config.address, kind, header, tail)
        with trio.fail_after(5):
            while self.unauthorized_frames(to) == before:
                await trio.sleep(0.005)


@asynccontextmanager
async def held_stream() -> AsyncIterator[Held]:
    """A held request, which must end undisturbed after the test."""
    async with small_mesh(**PATH) as mesh:
        held, reached = Held(mesh), trio.Event()
        engine = mesh.nodes["b"].engine
        engine.faults[HELD_AT] = lambda key: reached.set()

        async def stream() -> None:
            held.events += await run(mesh, a_request())

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream)
                await reached.wait()
                yield held
                engine.compute(engine.sequences[KEY], HELD_AT - 1, 1)
            await at_rest(mesh)
        assert tokens(held.events) == EXPECTED
        assert held.events[-1].attempts == 1


@pytest.mark.parametrize("sender", ["stranger", "a", "entry"])
@pytest.mark.parametrize("header", [A_TOKEN, THE_LAST_TOKEN])
async def test_the_entry_accepts_tokens_of_the_last_stage_only(sender: str, header: dict[str, Any]) -> None:
    async with held_stream() as held:
        await held.send(sender, "entry", "stage.tokens", header)


@pytest.mark.parametrize("sender", ["stranger", "entry"])
async def test_the_first_stage_accepts_tokens_of_the_last_stage_only(sender: str) -> None:
    async with held_stream() as held:
        await held.send(sender, "a", "stage.tokens", A_TOKEN)


@pytest.mark.parametrize(("sender", "to"), [("stranger", "b"), ("entry", "b"), ("b", "a"), ("stranger", "a")])
async def test_a_stage_accepts_activations_of_the_previous_stage_only(sender: str, to: str) -> None:
    async with held_stream() as held:
        await held.send(sender, to, "stage.hidden", SOME_ACTIVATIONS, b"?")


async def test_unauthorized_rows_do_not_affect_others_in_their_frame() -> None:
    async with held_stream() as held:
        pushed = held.mesh.nodes["b"].engine
        seen: list[bytes] = []
        compute = pushed.push

        def note(*hidden: HiddenOut) -> None:
            seen.extend(each.data for each in hidden)

        pushed.push = note  # type: ignore[method-assign]
        other = ["s2", 0, 1, 0, 1, 2, [], [], 0]
        rows = {"rows": [other, [*KEY, HELD_AT - 1, 1, 1, [], [], 0]]}
        held.mesh.nodes["a"].links.post(held.mesh.nodes["b"].links.config.address, "stage.hidden", rows, b"xxy")
        with trio.fail_after(5):
            while not seen:
                await trio.sleep(0.005)
        assert seen == [b"y"]
        pushed.push = compute  # type: ignore[method-assign]


@pytest.mark.parametrize("blamed", ["a", "b", "stranger"])
@pytest.mark.parametrize("retryable", [True, False])
async def test_only_a_stage_of_the_path_can_give_up_an_attempt(blamed: str, retryable: bool) -> None:
    async with held_stream() as held:
        address = held.mesh.nodes[blamed].links.config.address
        lost = {"key": KEY, "reason": "forged", "retryable": retryable, "address": address}
        await held.send("stranger", "entry", "stage.lost", lost)


@pytest.mark.parametrize(("sender", "to"), [("stranger", "a"), ("stranger", "b"), ("a", "b"), ("b", "a")])
async def test_only_its_entry_closes_a_sequence(sender: str, to: str) -> None:
    async with held_stream() as held:
        await held.send(sender, to, "stage.close", {"keys": [KEY]})


async def test_a_sequence_cannot_be_opened_in_the_name_of_another_entry() -> None:
    async with held_stream() as held:
        opened = held.opened("b")
        forged = msgspec.structs.replace(opened, sequence=msgspec.structs.replace(opened.sequence, attempt=2))
        to = held.mesh.nodes["b"].links.config.address
        with pytest.raises(BadRequest, match="entry"):
            await held.mesh.nodes["stranger"].links.call(to, "stage.open", {}, msgspec.msgpack.encode(forged))
        assert held.mesh.nodes["b"].stages.open_sequences == 1


async def test_a_sequence_key_in_use_is_refused_to_another_entry() -> None:
    async with held_stream() as held:
        same_key = msgspec.structs.replace(held.opened("b"), entry=NodeId("stranger"))
        to = held.mesh.nodes["b"].links.config.address
        with pytest.raises(Refused):
            await held.mesh.nodes["stranger"].links.call(to, "stage.open", {}, msgspec.msgpack.encode(same_key))
        assert held.opened("b").entry == "entry"


async def test_a_close_of_another_node_does_not_prevent_an_open() -> None:
    async with small_mesh(**PATH) as mesh:
        with trio.fail_after(10):
            for name in "ab":
                mesh.nodes["stranger"].links.post(mesh.nodes[name].links.config.address, "stage.close", {"keys": [KEY]})
            while not all(mesh.nodes[name].links.counters.frames_received_total for name in "ab"):
                await trio.sleep(0.005)
            events = await run(mesh)
        assert tokens(events) == EXPECTED and events[-1].attempts == 1


@pytest.mark.parametrize("spans", [{"entry": (0, 6)}, {"entry": (0, 3), "b": (3, 6)}, {"entry": (3, 6), "a": (0, 3)}])
async def test_an_entry_that_is_also_a_stage_is_authorized_for_both(spans: dict[str, tuple[int, int]]) -> None:
    async with small_mesh(**{name: (span,) for name, span in spans.items()}) as mesh:
        events = await run(mesh)
        await at_rest(mesh)
        assert tokens(events) == EXPECTED and events[-1].attempts == 1
        assert {use.node for use in events[-1].path} == set(spans)
        assert not any(node.stages.statistics().foreign_words_total for node in mesh.nodes.values())


async def test_unauthorized_senders_are_logged_once_a_minute() -> None:
    async with held_stream() as held:
        assert [held.unauthorized_frames(name) for name in held.mesh.nodes] == [0, 0, 0, 0]
        for _ in range(3):
            await held.send("stranger", "entry", "stage.tokens", A_TOKEN)
        now = trio.current_time()
        [refusal] = held.mesh.nodes["entry"].stages.refusals.recent(now)
        assert (refusal.host, refusal.count) == ("stranger", 3)
