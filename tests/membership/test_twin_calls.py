"""The shell on sockets: a copy of a running node is found before it speaks, and no answer counts without its signature."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio

from membership.core.config import MembershipConfig
from membership.simulation.network import Network
from membership.simulation.signer import StandInVerifier
from membership.trace.recording import RecordedCore
from membership.trace.replay import replay
from membership.trace.trace_format import Trace, read
from mesh.errors import BadRequest
from mesh.ids import NodeId
from mesh.keys.signing import Signer
from mesh.view import PeerState
from mesh.wire.twin import TWIN_KIND, WHERE_KIND, ProcessRun
from tests.membership.test_service import a_mesh, arrivals_take_no_time, until_state

__all__ = ["arrivals_take_no_time"]  # a fixture for all tests here


async def test_a_copy_finds_the_running_node_before_it_sends_anything(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        seed, running = await mesh.start(1), await mesh.start(2)
        await running.membership.join([seed.address])
        await until_state(seed, running.membership.me, PeerState.ALIVE)
        await trio.sleep(5)
        copy = await mesh.start(2, epoch=2)
        found = await copy.membership.twins.older_elsewhere([seed.address])
        assert found is not None and found.address == running.address and found.age_s >= 5
        assert (await copy.membership.twins.older_elsewhere([running.address])) is not None, "also where it is the seed itself"
        assert (await copy.membership.twins.older_elsewhere([copy.address, ("127.0.0.1", 1)])) is None
        running.kill(mesh)
        assert (await copy.membership.twins.older_elsewhere([seed.address])) is None, "it is gone: this is its next run"


async def test_a_copy_that_joined_another_way_is_displaced_and_the_mesh_keeps_the_older(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        seed, running = await mesh.start(1), await mesh.start(2)
        await running.membership.join([seed.address])
        await until_state(seed, running.membership.me, PeerState.ALIVE)
        await trio.sleep(5)
        copy = await mesh.start(2, epoch=2)
        by: list[ProcessRun] = []
        seen: list[ProcessRun] = []
        copy.membership.twins.on_displaced = by.append
        running.membership.twins.on_seen = seen.append
        await copy.membership.join([seed.address])
        with trio.fail_after(10):
            while not (by and seen):
                await trio.sleep(0.1)
        assert by[0].address == running.address and seen[0].address == copy.address
        copy.kill(mesh)
        await trio.sleep(5)
        peer = seed.membership.view.peers[running.membership.me]
        assert peer.address == running.address and peer.state is PeerState.ALIVE
        assert not running.membership.statistics().swim.health_score > 4


async def test_only_the_same_identity_is_answered_and_answers_are_signed(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with a_mesh() as mesh:
        one, other = await mesh.start(1), await mesh.start(2)
        asked: dict[str, Any] = {"challenge": bytes(16), "run": {"host": "127.0.0.1", "port": 9, "name": "n", "age_s": 1.0}}
        handler = one.membership.handlers[TWIN_KIND]
        with pytest.raises(BadRequest, match="only a process of the same node"):
            await handler(other.membership.me, asked, b"")
        for malformed in ({}, {**asked, "challenge": b"short"}, {**asked, "run": {"host": 1}}, {**asked, "run": None}):
            with pytest.raises(BadRequest, match="no question of a twin"):
                await handler(one.membership.me, malformed, b"")

        async def forged(to: Any, kind: str, header: Any, tail: bytes = b"", *, timeout_s: float = 10.0) -> Any:
            reply, tail = await handler(one.membership.me, header, tail)
            return {**reply, "answer": {**msgspec.convert(reply["answer"], dict[str, object]), "stops": "asker"}}, tail

        one.membership.twins._call = forged
        assert await one.membership.twins.ask(("127.0.0.1", 9)) is None

        async def told_again(to: Any, kind: str, header: Any, tail: bytes = b"", *, timeout_s: float = 10.0) -> Any:
            return await handler(one.membership.me, {**header, "challenge": bytes(16)}, tail)

        one.membership.twins._call = told_again
        assert await one.membership.twins.ask(("127.0.0.1", 9)) is None, "an answer to another challenge"


async def test_a_member_returns_the_address_of_a_live_node_to_itself_only(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        one, other = await mesh.start(1), await mesh.start(2)
        await one.membership.join([other.address])
        await until_state(one, other.membership.me, PeerState.ALIVE)
        where = one.membership.handlers[WHERE_KIND]
        received, _ = await where(other.membership.me, {"node": other.membership.me}, b"")
        assert (received["host"], received["port"]) == other.address
        for strange in ({}, {"node": 7}, {"node": "f" * 16}):
            assert await where(other.membership.me, strange, b"") == ({}, b"")


@pytest.mark.parametrize("seed", range(3))
def test_a_run_with_a_twin_in_it_is_replayed_to_the_last_effect(seed: int) -> None:
    traces = {"node-2": Trace(1 << 24), "node-5": Trace(1 << 24)}

    def core(me: Any, signer: Signer, config: MembershipConfig, rng: Any, now: float) -> Any:
        from membership.core.core import MembershipCore

        kept = traces.get(me.name)
        return RecordedCore(me, signer, config, rng, now, kept) if kept else MembershipCore(me, signer, config, rng, now)

    network = Network(seed, core=core)
    ids: list[NodeId] = network.grow(5)
    copy = network.add([ids[0]], epoch=2, twin_of=ids[2])
    network.run(20.0)
    assert not network.nodes[copy].running
    for kept in traces.values():
        found = replay(read(kept.dump()), StandInVerifier())
        assert found.exact and found.differs_at is None and found.inputs == found.agreed
