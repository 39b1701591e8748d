"""A run that was recorded is replayed to the last effect, in the simulator and on real sockets; what is no trace is refused."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.simulation.network import Network
from membership.simulation.signer import StandInSigner, StandInVerifier
from membership.trace import trace_format
from membership.trace.recording import RecordedCore
from membership.trace.replay import Replay, replay
from membership.trace.trace_format import MAGIC, BadTrace, Trace, read
from mesh.ids import NodeId
from mesh.keys.signing import Signer
from mesh.view import Facts, PeerState
from mesh.wire.gossip import Alive
from tests.membership.pieces import ME, alive, core_of, exchange
from tests.membership.test_service import a_mesh, until_state

RING_BYTES = 64 * 2**20


def recorded_run(seed: int, ring_bytes: int = RING_BYTES, nodes: int = 8) -> tuple[Trace, Network, list[NodeId]]:
    """A stormy minute of a mesh, as the third node lives it: loss, facts, a crash, a silent death, a sleep, a leave."""
    kept = Trace(ring_bytes)

    def core(me: Alive, signer: Signer, config: MembershipConfig, rng: Random, now: float) -> MembershipCore:
        return (
            RecordedCore(me, signer, config, rng, now, kept)
            if me.name == "node-2"
            else MembershipCore(me, signer, config, rng, now)
        )

    network = Network(seed, loss=0.05, core=core)
    ids = network.grow(nodes)
    network.publish(ids[2], Facts(http="http://two"))
    network.publish(ids[4], Facts(http="http://four", documents={"digest": "x" * 5000}))
    network.crash(ids[5])
    network.run(3)
    network.kill(ids[6])
    network.pause(ids[2])
    network.run(4)
    network.resume(ids[2])
    network.run(12)
    network.add(ids[:1], number=5, epoch=2)
    network.run(3)
    network.leave(ids[7])
    network.run(3)
    return kept, network, ids


def replayed(kept: Trace) -> Replay:
    return replay(read(kept.dump()), StandInVerifier())


@pytest.mark.parametrize("seed", range(3))
def test_a_recorded_run_is_replayed_to_the_last_effect(seed: int) -> None:
    kept, network, ids = recorded_run(seed)
    found = replayed(kept)
    assert found.exact and found.inputs == found.agreed > 300, f"seed {seed}: differs at {found.differs_at}"
    lived = [(s.at, s.node, s.before, s.after) for s in network.seen if s.by == ids[2] and s.before is not s.after]
    received = [(event.at_s, event.node, event.before, event.after) for event in found.events if event.before is not event.after]
    assert received == lived and {event.after for event in found.events} == set(PeerState)


def test_a_replay_reports_the_first_input_that_is_answered_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _, _ = recorded_run(1)
    monkeypatch.setattr("membership.core.swim._NACK_SHARE", 0.5)
    found = replayed(kept)
    assert found.differs_at is not None and 0 < found.differs_at < found.inputs and found.agreed < found.inputs


def test_a_trace_without_its_beginning_is_bounded_and_replayed_from_a_checkpoint() -> None:
    kept, _, ids = recorded_run(1, ring_bytes=30_000)
    raw = kept.dump()
    assert kept.dropped_records > 0 and len(raw) < 60_000
    found = replayed(kept)
    assert not found.exact and found.inputs >= 40 and found.differs_at is None
    left = [event for event in found.events if event.node == ids[7] and event.after is PeerState.LEFT]
    assert left and left[0].name == "node-7", "it was known from the checkpoint"


def test_segments_do_not_break_an_exact_replay() -> None:
    kept, _, _ = recorded_run(2, ring_bytes=160_000)
    assert kept.dropped_records == 0
    found = replayed(kept)
    assert found.exact and found.inputs == found.agreed
    assert sum(isinstance(record.input, trace_format.CheckpointInput) for record in read(kept.dump())) >= 1


def test_a_checkpoint_changes_no_answer_when_facts_exceed_one_message() -> None:
    """Whose facts are told first next time depends on what was told before, to the checkpoint too."""
    kept = Trace(4 * 3_000_000)
    core = RecordedCore(alive(0), StandInSigner(ME), MembershipConfig(), Random(1), 0.0, kept)
    for number in range(1, 5):
        other = core_of(alive(number), MembershipConfig(), Random(number))
        other.publish(Facts(documents={"digest": "x" * 900_000}), 0.0)
        exchange(core, other, 1.0)
    newcomer = core_of(alive(9), MembershipConfig(), Random(9))
    for step in range(3):
        synced, _ = core.answer(newcomer.me, newcomer.ask(), 2.0 + step)
        assert synced.more
    assert sum(isinstance(record.input, trace_format.CheckpointInput) for record in read(kept.dump())) == 1
    found = replayed(kept)
    assert found.exact and found.inputs == found.agreed, found.differs_at


async def test_a_real_node_on_loopback_is_replayed_to_the_last_effect(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.start(0)
        traced = await mesh.start(1, trace_bytes=RING_BYTES)
        third = await mesh.start(2)
        for running in (traced, third):
            assert await running.membership.join([first.address]) == 1
        traced.membership.publish(Facts(http="http://traced"))
        await trio.sleep(5)
        third.kill(mesh)
        traced.membership.lost(third.membership.me)
        with trio.fail_after(30):
            await until_state(traced, third.membership.me, PeerState.DEAD)
        await traced.membership.leave()
        raw = traced.membership.dump_trace()
        assert raw is not None and first.membership.dump_trace() is None
    found = replay(read(raw), StandInVerifier())
    assert found.exact and found.inputs == found.agreed > 30, found.differs_at
    assert [event.after.value for event in found.events if event.node == third.membership.me] == ["alive", "suspect", "dead"]


def test_what_no_core_would_tell_is_not_in_it() -> None:
    kept, _, _ = recorded_run(1)
    assert b"node-4" in kept.dump(), "names are"
    fields = {name for kind in trace_format.Input.__args__ for name in kind.__struct_fields__}
    assert not any("secret" in name or "private" in name or name in ("key", "prompt") for name in fields)


@pytest.mark.parametrize("raw", [b"", b"mesh", MAGIC, MAGIC + b"\x00\x00\x00\x09abc", MAGIC + b"\xff" * 40, b"\x80" * 100])
def test_what_is_no_trace_is_refused_with_a_reason(raw: bytes) -> None:
    with pytest.raises(BadTrace):
        read(raw)


@given(st.data())
def test_a_damaged_trace_is_refused_or_replayed_and_never_worse(data: st.DataObject) -> None:
    raw = bytearray(SHORT)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        replay(read(bytes(raw)), StandInVerifier())
    except BadTrace:
        pass


def _short() -> bytes:
    records = read(recorded_run(3, nodes=8)[0].dump())[:60]
    kept = Trace(RING_BYTES)
    for record in records:
        kept.add(record)
    assert msgspec.msgpack.encode(records[0])
    return kept.dump()


SHORT = _short()
