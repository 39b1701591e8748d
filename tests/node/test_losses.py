"""Broken links, nodes that die and restart, many requests at once: no token changes, and no sequence stays."""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from membership.shell.events import MemberEvent
from mesh.ids import NodeId, StreamId
from mesh.view import PeerState, Readiness
from node.engine.api import SequenceKey, TokenOut
from node.entry.generation import RetryLimits
from node.entry.recent import RequestRecord
from node.requests import ChoiceDone, TextDelta
from tests.node.paths import SmallMesh, a_request, small_mesh, token_at

SPLIT = {"entry": (), "a": ((0, 4),), "b": ((2, 6),), "c": ((0, 2), (4, 6))}
TOKENS = 40
SILENCE_S = RetryLimits().silence_s  # what is only noticed by silence takes as long
EXPECTED = [token_at(position) for position in range(10, 10 + TOKENS)]


async def tokens_of(
    mesh: SmallMesh, stream: str, each: Callable[[], None] = lambda: None, **changes: Any
) -> dict[int, list[int]]:
    """The tokens of each choice."""
    answers: dict[int, list[int]] = {}
    async with mesh.nodes["entry"].entry.generate(a_request(id=StreamId(stream), max_tokens=TOKENS, **changes)) as events:
        async for event in events:
            if isinstance(event, (TextDelta, ChoiceDone)):
                answers.setdefault(event.choice, []).extend(event.token_ids)
                each()
    return answers


def record_of(mesh: SmallMesh, request: str) -> RequestRecord:
    found = mesh.nodes["entry"].entry.recent.find(request)
    assert found is not None
    return found


def held(mesh: SmallMesh) -> dict[NodeId, tuple[object, ...]]:
    return {
        node.id: (sorted(node.engine.sequences), node.stages.open_sequences, node.entry.open_requests)
        for node in mesh.live
        if node.engine.sequences or node.stages.open_sequences or node.entry.open_requests
    }


async def nothing_stays(mesh: SmallMesh, within_s: float = 5.0) -> None:
    with trio.move_on_after(within_s):
        while held(mesh):
            await trio.sleep(0.01)
    assert not held(mesh)


class Attack:
    """Breaks links and kills nodes, with the probability `share` at each token that a client reads."""

    def __init__(self, mesh: SmallMesh, rng: Random, share: float, most: int) -> None:
        self.mesh, self.rng, self.share, self.left = mesh, rng, share, most
        self.restarts = trio.open_memory_channel[str](100)

    def __call__(self) -> None:
        if self.left and self.rng.random() < self.share:
            self.left -= 1
            self.rng.choice((self.cut, self.cut, self.kill))()

    def cut(self) -> None:
        one, other = self.rng.sample(sorted(self.mesh.live, key=lambda node: node.id), 2)
        one.links.cut(other.links.config.address)

    def kill(self) -> None:
        live = [name for name in "abc" if self.mesh.nodes[name] in self.mesh.live]
        if len(live) == 3:
            victim = self.rng.choice(live)
            self.mesh.nodes[victim].kill()
            self.restarts[0].send_nowait(victim)

    async def restart_the_dead(self) -> None:
        async for name in self.restarts[1]:
            await trio.sleep(self.rng.choice((0.0, 1.0)))
            await self.mesh.restart(name)


@pytest.mark.parametrize("seed", range(20))
async def test_under_any_losses_requests_get_their_tokens_and_no_sequence_stays(seed: int, mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.02
    rng = Random(seed)
    async with small_mesh(**SPLIT) as mesh, trio.open_nursery() as nursery:
        attack = Attack(mesh, rng, share=0.05, most=6)
        nursery.start_soon(attack.restart_the_dead)
        answers = {}
        began = trio.current_time()

        async def ask(number: int) -> None:
            answers[number] = await tokens_of(mesh, f"s{number}", attack, n=1 + number % 2)

        async with trio.open_nursery() as clients:
            for number in range(6):
                clients.start_soon(ask, number)

        assert answers == {number: {choice: EXPECTED for choice in range(1 + number % 2)} for number in range(6)}
        assert attack.left < 6
        assert trio.current_time() - began < SILENCE_S, "some loss was not reported"
        await nothing_stays(mesh)
        nursery.cancel_scope.cancel()


async def test_a_last_token_lost_with_its_link_is_drawn_again(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.02
    async with small_mesh(entry=(), only=((0, 6),)) as mesh:
        entry, only = mesh.nodes["entry"], mesh.nodes["only"]
        last = 10 + TOKENS - 1

        def lose_with_the_link(key: SequenceKey) -> None:
            only.engine.deliver(TokenOut(key, last, token_at(last), "length"))
            trio.lowlevel.current_trio_token().run_sync_soon(only.links.cut, entry.links.config.address)

        only.engine.faults[last] = lose_with_the_link
        began = trio.current_time()

        assert await tokens_of(mesh, "s1") == {0: EXPECTED}
        assert trio.current_time() - began < SILENCE_S
        await nothing_stays(mesh)


async def test_a_close_lost_with_its_link_leaves_no_sequence_behind(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.02
    async with small_mesh(entry=(), only=((0, 6),)) as mesh:
        entry, only = mesh.nodes["entry"], mesh.nodes["only"]
        only.engine.faults[20] = lambda key: None  # no further token
        only.links.receivers["stage.close"] = lambda *frame: None  # the close is lost
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tokens_of, mesh, "s1")
            while 20 in only.engine.faults:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert only.engine.sequences
        entry.links.cut(only.links.config.address)
        await nothing_stays(mesh)


def publish(mesh: SmallMesh, name: str, readiness: Readiness) -> None:
    mesh.nodes[name].readiness = readiness
    mesh.nodes["entry"].losses.view_changed(mesh.view())


@pytest.mark.parametrize("silent_s", [0.0, 5.0])
async def test_a_request_leaves_a_node_that_publishes_a_stall(silent_s: float, mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.02
    async with small_mesh(entry=(), a=((0, 6),), b=((0, 6),)) as mesh, trio.open_nursery() as nursery:
        hung: list[str] = []

        def note(name: str, key: SequenceKey) -> None:
            hung.append(name)

        for name in "ab":
            mesh.nodes[name].engine.faults[20] = partial(note, name)
        answers = {}

        async def ask() -> None:
            answers.update(await tokens_of(mesh, "s1"))

        async with trio.open_nursery() as clients:
            clients.start_soon(ask)
            while not hung:
                await trio.sleep(0.01)
            for name in "ab":
                mesh.nodes[name].engine.faults.clear()
            await trio.sleep(silent_s)
            stalled_at = trio.current_time()
            publish(mesh, hung[0], Readiness.STALLED)
        assert answers == {0: EXPECTED}
        assert trio.current_time() - stalled_at < RetryLimits().stall_s + 0.5
        other = mesh.nodes["b" if hung == ["a"] else "a"]
        assert [sequence.known for sequence in other.engine.opened] == [20], "the other node goes on where the hung one stopped"
        await nothing_stays(mesh)
        nursery.cancel_scope.cancel()


async def test_a_node_that_was_stalled_is_given_work_again(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.02
    async with small_mesh(entry=(), a=((0, 6),), b=((0, 6),)) as mesh:
        for number, (hung, other) in enumerate([("a", "b"), ("b", "a"), ("a", "b")]):
            publish(mesh, hung, Readiness.STALLED)
            publish(mesh, other, Readiness.WARM)
            for node in mesh.nodes.values():
                node.engine.opened.clear()
            assert await tokens_of(mesh, f"s{number}") == {0: EXPECTED}
            assert not mesh.nodes[hung].engine.opened, "new requests avoid a stalled node"
            assert mesh.nodes[other].engine.opened


async def test_a_stalled_node_without_an_alternative_is_asked_again(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.02
    async with small_mesh(entry=(), only=((0, 6),)) as mesh:
        only = mesh.nodes["only"].engine
        only.faults[20] = lambda key: trio.lowlevel.current_trio_token().run_sync_soon(publish, mesh, "only", Readiness.STALLED)
        assert await tokens_of(mesh, "s1") == {0: EXPECTED}
        assert [sequence.known for sequence in only.opened] == [10, 20]
        await nothing_stays(mesh)


async def test_an_entry_that_was_only_suspended_is_sent_its_losses(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.02
    async with small_mesh(**SPLIT) as mesh:
        for name in "abc":
            mesh.nodes[name].engine.faults[20] = lambda key: None  # its outputs went to a dead node
        began = trio.current_time()
        answers = {}

        async def ask() -> None:
            answers.update(await tokens_of(mesh, "s1"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while all(20 in mesh.nodes[name].engine.faults for name in "abc"):
                await trio.sleep(0.01)
            down = MemberEvent(NodeId("entry"), PeerState.SUSPECT, PeerState.DEAD)
            for name in "abc":
                mesh.nodes[name].engine.faults.clear()
                mesh.nodes[name].stages.entry_lost(down.node, down.after.value)

        assert answers == {0: EXPECTED}
        assert trio.current_time() - began < SILENCE_S
        await nothing_stays(mesh)


async def test_a_node_whose_link_broke_is_avoided_by_the_next_requests() -> None:
    async with small_mesh(entry=(), a=((0, 6),), b=((0, 6),)) as mesh:
        await tokens_of(mesh, "s1")
        dead = next(node for name in "ab" if (node := mesh.nodes[name]).engine.opened)
        dead.kill()
        dead.state = PeerState.ALIVE  # membership has not noticed yet
        while mesh.nodes["entry"].links.counters.links_lost_total == 0:
            await trio.sleep(0.01)
        for number in range(5):
            await tokens_of(mesh, f"t{number}")
            assert record_of(mesh, f"t{number}").attempts == 1


async def test_a_silent_stage_is_left_once_membership_suspects_it(mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.02
    async with small_mesh(**SPLIT) as mesh:
        entry = mesh.nodes["entry"]
        silent = set()

        def look_at(node: NodeId) -> None:
            if node in silent and mesh.nodes[node].state is PeerState.ALIVE:
                mesh.nodes[node].state = PeerState.SUSPECT
                entry.losses.member_changed(MemberEvent(node, PeerState.ALIVE, PeerState.SUSPECT))

        mesh.looked_at = look_at

        def fall_silent(name: str, key: SequenceKey) -> None:
            silent.add(NodeId(name))
            for other in "abc":
                mesh.nodes[other].engine.faults.clear()

        for name in "abc":
            mesh.nodes[name].engine.faults[20] = partial(fall_silent, name)
        began = trio.current_time()

        assert await tokens_of(mesh, "s1") == {0: EXPECTED}
        assert record_of(mesh, "s1").attempts == 2
        assert trio.current_time() - began < 10.0
        for name in "abc":
            mesh.nodes[name].state = PeerState.ALIVE
        await nothing_stays(mesh)
