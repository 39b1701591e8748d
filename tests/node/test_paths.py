"""Requests over paths of several nodes, with all kinds of losses and refusals on the way."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec
import pytest
import trio

from mesh.errors import BadRequest, NoPath, RemoteError
from mesh.ids import NodeId, StreamId
from node.engine.api import SequenceKey, TokenOut
from node.entry.entry import Entry
from node.entry.recent import RequestRecord
from node.requests import ChoiceDone, Finished, GenerateRequest, Started, TextDelta
from node.serving.stages import OpenStage
from tests.node.paths import SmallMesh, a_request, small_mesh, token_at

SPLIT = {"entry": (), "a": ((0, 4),), "b": ((2, 6),), "c": ((0, 2), (4, 6))}
EXPECTED = [token_at(position) for position in range(10, 30)]


async def run(
    mesh: SmallMesh, request: GenerateRequest | None = None, each: Callable[[Any], None] = lambda event: None
) -> list[Any]:
    """All events of one request at the entry."""
    events: list[Any] = []
    async with mesh.nodes["entry"].entry.generate(request or a_request()) as stream:
        async for event in stream:
            events.append(event)
            each(event)
    return events


def record_of(entry: Entry, request: str = "s1") -> RequestRecord:
    found = entry.recent.find(request)
    assert found is not None
    return found


def tokens(events: Iterable[Any], choice: int = 0) -> list[int]:
    return [token for event in events if isinstance(event, TextDelta) and event.choice == choice for token in event.token_ids]


async def at_rest(mesh: SmallMesh) -> None:
    """Waits until no node holds a sequence, as closes are frames of their own."""
    live = [node for node in mesh.nodes.values() if not node.scope.cancel_called]
    while any(node.engine.sequences or node.stages.open_sequences or node.entry.open_requests for node in live):
        await trio.sleep(0.01)


async def test_a_split_path_delivers_every_token_once() -> None:
    async with small_mesh(**SPLIT) as mesh:
        events = await run(mesh)
        await at_rest(mesh)

        assert tokens(events) == EXPECTED
        assert isinstance(events[-2], ChoiceDone) and events[-2].finish_reason == "length"
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert (finished.seq, finished.attempts, finished.numerics) == (20, 1, "exact")
        assert len({use.node for use in finished.path}) == 2


@pytest.mark.parametrize("after", [1, 7, 18])
async def test_any_stage_that_dies_at_any_token_costs_no_token(after: int) -> None:
    for victim_stage in (0, 1):
        async with small_mesh(**SPLIT) as mesh:
            entry = mesh.nodes["entry"].entry

            def kill(event: Any, mesh: SmallMesh = mesh, entry: Entry = entry, victim_stage: int = victim_stage) -> None:
                if isinstance(event, TextDelta) and event.seq == after and len(mesh.nodes) == 4:
                    path = record_of(entry).report().path
                    victim = mesh.nodes[path[victim_stage].node]
                    if not victim.scope.cancel_called and record_of(entry).attempts == 1:
                        victim.kill()

            events = await run(mesh, each=kill)

            assert tokens(events) == EXPECTED
            assert events[-1].attempts == 2 or (events[-1].attempts == 1 and after > 15)  # it may have been done already


async def test_the_first_stages_open_has_the_cached_pages_of_the_others() -> None:
    async with small_mesh(entry=(), a=((0, 2),), b=((2, 4),), c=((4, 6),)) as mesh:
        for name, pages in (("a", 9), ("b", 3), ("c", 5)):
            mesh.nodes[name].engine.pages = pages
        events = await run(mesh)

        prefixes = {name: prefix for name in "abc" if (prefix := mesh.nodes[name].engine.opened[0].prefix)}
        assert [prefixes[name].elsewhere for name in "abc"] == [3, None, None]
        assert all(each.salt == prefixes["a"].salt and each.numerics == "n" for each in prefixes.values())
        assert events[-1].cached_tokens == 5


async def test_an_open_carries_priority_remaining_time_and_last_choice() -> None:
    async with small_mesh(entry=(), a=((0, 6),), b=((0, 6),)) as mesh:
        await run(mesh, a_request(priority=-3))
        [opened] = [each for name in "ab" for each in mesh.nodes[name].engine.opened]
        assert (
            opened.priority == -3
            and opened.remaining_ms is not None
            and 50_000 < opened.remaining_ms <= 60_000
            and not opened.last_choice
        )
    async with small_mesh(entry=(), only=((0, 6),)) as mesh:
        await run(mesh)
        [opened] = mesh.nodes["only"].engine.opened
        assert opened.priority == 0 and opened.last_choice
    async with small_mesh(entry=(), a=((0, 3),), b=((3, 6),)) as mesh:
        await run(mesh)
        assert not any(each.last_choice for name in "ab" for each in mesh.nodes[name].engine.opened), "it is one of two"


async def test_an_invalid_answer_to_an_open_is_a_lost_stage() -> None:
    async with small_mesh(entry=(), a=((0, 6),), b=((0, 6),)) as mesh:
        mesh.nodes["a"].engine.pages = mesh.nodes["b"].engine.pages = -1
        with trio.move_on_after(0.5):
            await run(mesh)
        assert record_of(mesh.nodes["entry"].entry).attempts > 1


async def test_an_evicted_sequence_is_replayed_on_another_path() -> None:
    async with small_mesh(**SPLIT) as mesh:
        for name in "abc":
            engine = mesh.nodes[name].engine
            engine.faults[17] = engine.lose
        events = await run(mesh)
        await at_rest(mesh)

        assert tokens(events) == EXPECTED
        assert events[-1].attempts > 1
        replays = [opened for name in "abc" for opened in mesh.nodes[name].engine.opened if opened.attempt > 1]
        assert replays and all(opened.known == 17 for opened in replays)


async def test_a_late_token_of_an_older_attempt_is_dropped_and_counted() -> None:
    async with small_mesh(**SPLIT) as mesh:
        entry = mesh.nodes["entry"].entry
        for name in "abc":
            engine = mesh.nodes[name].engine
            engine.faults[17] = engine.lose

        def late(event: Any) -> None:
            if isinstance(event, TextDelta) and event.seq == 15:
                old = SequenceKey(StreamId("s1"), 0, 1)
                assert entry.token(TokenOut(old, 18, 99), NodeId("b"))

        assert tokens(await run(mesh, each=late)) == EXPECTED
        assert entry.statistics().counters.late_tokens_total == 1


async def test_a_full_node_is_waited_for() -> None:
    async with small_mesh(entry=(), only=((0, 6),)) as mesh:
        mesh.nodes["only"].engine.refuse = 4

        assert tokens(await run(mesh)) == EXPECTED
        assert mesh.nodes["entry"].entry.statistics().counters.opens_refused_total == 4


async def test_more_requests_than_places_are_served_as_places_become_free() -> None:
    async with small_mesh(one=(), two=(), a=((0, 6),), b=((0, 6),)) as mesh:
        for name in "ab":
            mesh.nodes[name].engine.places = 2
        answers: list[list[int]] = []

        async def ask(number: int) -> None:
            entry = mesh.nodes[("one", "two")[number % 2]].entry
            request = GenerateRequest(StreamId(f"s{number}"), None, prompt="x", max_tokens=20)
            async with entry.generate(request) as events:
                answers.append(tokens([event async for event in events]))

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(ask, number)
        await at_rest(mesh)
        assert answers == [EXPECTED] * 30
        entries = [mesh.nodes[name].entry.statistics() for name in ("one", "two")]
        stages = [mesh.nodes[name].stages.statistics() for name in "ab"]
        assert sum(stage.room_granted_total for stage in stages) > 0
        assert sum(entry.counters.opens_refused_total for entry in entries) < 90, "no request is sent out again and again"
        assert all(entry.queued == 0 for entry in entries)
        with trio.fail_after(10):  # demand is withdrawn in a frame of its own
            while any(mesh.nodes[name].entry.statistics().full_nodes for name in ("one", "two")):
                await trio.sleep(0.01)


async def test_a_refused_request_keeps_its_place_before_later_ones() -> None:
    async with small_mesh(entry=(), only=((0, 6),)) as mesh:
        entry, engine = mesh.nodes["entry"].entry, mesh.nodes["only"].engine
        engine.places = 1
        begun: list[str] = []

        async def ask(name: str) -> None:
            request = GenerateRequest(StreamId(name), None, prompt="x", max_tokens=20)
            async with entry.generate(request) as events:
                async for event in events:
                    if isinstance(event, Started):
                        begun.append(name)

        async with trio.open_nursery() as nursery:
            for number in range(15):
                nursery.start_soon(ask, f"s{number:02}")
                await trio.sleep(0.003)
        # Until the stage has the first demand, a later open may find the place that an earlier one was refused.
        assert all(abs(begun.index(name) - place) <= 4 for place, name in enumerate(sorted(begun)))


async def test_nothing_is_sent_to_the_client_before_a_path_has_opened() -> None:
    async with small_mesh(entry=(), only=((0, 6),)) as mesh:
        mesh.nodes["only"].engine.places = 0
        seen: list[Any] = []
        with trio.move_on_after(0.3):
            await run(mesh, each=seen.append)
        assert seen == []
        await at_rest(mesh)
        assert mesh.nodes["entry"].entry.statistics().queued == 0


async def test_no_path_is_an_error_that_names_the_gap() -> None:
    async with small_mesh(entry=(), a=((0, 2),), b=((4, 6),)) as mesh:
        with pytest.raises(NoPath, match="layers 2:4"):
            await run(mesh)


async def test_a_request_at_fault_fails_at_once_and_frees_its_path() -> None:
    async with small_mesh(**SPLIT) as mesh:
        for name in "abc":
            engine = mesh.nodes[name].engine
            engine.faults[12] = partial(engine.lose, reason="logits are not numbers", retryable=False)
        with pytest.raises(BadRequest, match="not numbers"):
            await run(mesh)
        await at_rest(mesh)


async def test_several_choices_count_one_seq_and_end_each() -> None:
    async with small_mesh(**SPLIT) as mesh:
        events = await run(mesh, a_request(n=3))

        assert all(tokens(events, choice) == EXPECTED for choice in range(3))
        assert sorted(event.choice for event in events if isinstance(event, ChoiceDone)) == [0, 1, 2]
        assert events[-1].seq == events[-1].completion_tokens == 60
        seqs = [event.seq for event in events if isinstance(event, TextDelta)]
        assert seqs == sorted(seqs)


async def test_a_stop_string_ends_the_answer_and_frees_its_stages() -> None:
    async with small_mesh(**SPLIT) as mesh:
        text = "".join(map(chr, EXPECTED))
        events = await run(mesh, a_request(stop=(text[5:8],)))
        await at_rest(mesh)

        text_sent = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert text_sent == text[:5]
        assert [event.finish_reason for event in events if isinstance(event, ChoiceDone)] == ["stop"]


async def test_tokens_after_a_completed_stop_string_change_nothing() -> None:
    async with small_mesh(entry=(), only=((0, 6),)) as mesh:
        engine = mesh.nodes["only"].engine

        def burst(key: SequenceKey) -> None:
            engine.deliver(*(TokenOut(key, position, token_at(position)) for position in range(15, 25)))

        engine.faults[15] = burst
        text = "".join(map(chr, EXPECTED))
        events = await run(mesh, a_request(stop=(text[7:9],)))
        await at_rest(mesh)

        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == text[:7]
        [done] = [event for event in events if isinstance(event, ChoiceDone)]
        listed = [*tokens(events), *done.token_ids]
        assert listed == EXPECTED[:9] and events[-1].seq == done.seq == 9


async def test_a_disconnected_client_frees_all_stages() -> None:
    async with small_mesh(**SPLIT) as mesh:
        async with mesh.nodes["entry"].entry.generate(a_request(max_tokens=900)) as stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    break
        await at_rest(mesh)

        assert record_of(mesh.nodes["entry"].entry).state() == "cancelled"


async def test_an_open_that_comes_after_its_close_is_refused() -> None:
    async with small_mesh(**SPLIT) as mesh:
        stages, entry = mesh.nodes["a"].stages, mesh.nodes["entry"].id
        events = await run(mesh)
        opened = [sequence for node in mesh.nodes.values() for sequence in node.engine.opened]
        assert tokens(events) == EXPECTED and opened

        never_seen = msgspec.structs.replace(opened[0], attempt=7)
        stages.receivers["stage.close"](entry, {"keys": [list(never_seen.key)]}, b"")
        late = OpenStage(never_seen, entry, None, entry, ("h", 1), ("h", 1), None)
        with pytest.raises(RemoteError, match="closed before it was opened"):
            await stages.handlers["stage.open"](entry, {}, msgspec.msgpack.encode(late))


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        ("stage.tokens", {"tokens": [["s1", 0, 1, "10", 65, None, None, []]]}),
        ("stage.tokens", {"tokens": [["s1", 0, 1, 10, "A", None, None, []]]}),
        ("stage.tokens", {"tokens": [["s1", 0, 1, 10, -1, None, None, []]]}),
        ("stage.tokens", {"tokens": [["s1", 0, 1, 10, 2**40, None, None, []]]}),
        ("stage.tokens", {"tokens": [["s1", 0, 1, 10, 65, 7, None, []]]}),
        ("stage.tokens", {"tokens": [["s1", 0, 1, 10, 65, None, "?", [["x", None]]]]}),
        ("stage.tokens", {"tokens": [[[], 0, 1, 10, 65, None, None, []]]}),
        ("stage.hidden", {"rows": [["s1", 0, 1, 0, 0, 0]]}),
        ("stage.hidden", {"rows": [["s1", 0, 1, "0", 1, 0]]}),
        ("stage.lost", {"key": ["s1", 0, 1], "reason": "x", "retryable": True, "address": []}),
        ("stage.lost", {"key": ["s1", 0, 1], "reason": "x", "retryable": True, "address": ["h", float("inf")]}),
        ("stage.lost", {"key": ["s1", 0, 1], "reason": None, "retryable": False, "address": None}),
        ("stage.close", {"keys": [["s1", {}, 1]]}),
    ],
)
async def test_a_malformed_frame_of_a_peer_changes_nothing(kind: str, header: dict[str, Any]) -> None:
    async with small_mesh(**SPLIT) as mesh:
        entry = mesh.nodes["entry"]

        def send_malformed(event: Any) -> None:
            if isinstance(event, Started):
                mesh.nodes["a"].links.post(entry.links.config.address, kind, header)

        events = await run(mesh, each=send_malformed)
        while not entry.links.counters.frames_rejected_total:  # it has a link of its own
            await trio.sleep(0.01)

        assert tokens(events) == EXPECTED
        assert events[-1].attempts == 1


async def test_sequences_of_a_dead_entry_are_freed() -> None:
    async with small_mesh(**SPLIT) as mesh:
        stuck = mesh.nodes["b"].engine
        for name in "abc":
            mesh.nodes[name].engine.faults[12] = lambda key: None  # never answers
        with trio.move_on_after(0.5):
            await run(mesh)
        for node in mesh.nodes.values():
            node.stages.entry_lost(mesh.nodes["entry"].id, "dead")
        assert not stuck.sequences


async def test_idle_sequences_are_swept() -> None:
    async with small_mesh(**SPLIT) as mesh:
        for name in "abc":
            mesh.nodes[name].engine.faults[12] = lambda key: None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, mesh)
            while not any(node.stages.open_sequences for node in mesh.nodes.values()):
                await trio.sleep(0.01)
            await trio.sleep(0.05)
            for node in mesh.nodes.values():
                node.stages.sweep(trio.current_time() + 1000)
            assert not any(node.engine.sequences for node in mesh.nodes.values())
            nursery.cancel_scope.cancel()
