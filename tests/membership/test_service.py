"""The shell on real loopback sockets and a clock that jumps: no test here waits for real time."""

from __future__ import annotations

import socket as stdlib_socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import pytest
import trio
import trio.testing

from membership.core.config import MembershipConfig
from membership.shell.events import JoinFailed, LossBatch, MemberEvent
from membership.shell.service import Membership
from membership.simulation.signer import StandInSigner
from mesh.errors import BadRequest, LocalError, PeerLost
from mesh.ids import Address, NodeId, format_address
from mesh.keys.seal import KeySeal, PlainSeal, Seal
from mesh.view import Facts, Load, PeerState
from mesh.wire.calls import CallReply, Header
from mesh.wire.datagram_codec import decode, encode
from mesh.wire.gossip import MAX_DATAGRAM_BYTES, Ack, Alive, Gossip, Ping, Sender
from mesh.wire.sync import SYNC_KIND
from tests.membership.pieces import signed


@dataclass
class Running:
    membership: Membership
    socket: trio.socket.SocketType
    address: Address
    scope: trio.CancelScope

    def kill(self, mesh: Mesh) -> None:
        self.scope.cancel()
        del mesh.at[self.address]
        self.socket.close()


class Mesh:
    """Real datagrams between the members; peer calls go straight to the callee's registered answer."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.at: dict[Address, Membership] = {}
        self.garbled = False

    async def start(
        self,
        number: int,
        *,
        seal: Seal | None = None,
        epoch: int = 1,
        config: MembershipConfig | None = None,
        name: str = "",
        trace_bytes: int = 0,
    ) -> Running:
        me = NodeId(f"{number:016x}")
        socket = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
        await socket.bind(("127.0.0.1", 0))
        address: Address = socket.getsockname()

        async def call(to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0) -> CallReply:
            await trio.lowlevel.checkpoint()
            if (peer := self.at.get(to)) is None:
                raise PeerLost(format_address(to), "connection refused")
            if self.garbled:
                return {}, b"\xc1"
            return await peer.handlers[kind](me, header, tail)

        membership = Membership(
            me,
            name or f"node-{number}",
            "here",
            epoch,
            signer=StandInSigner(me),
            socket=socket,
            address=address,
            seal=seal or PlainSeal(),
            call=call,
            config=config,
            rng=Random(number),
            load=lambda: Load(running=number),
            trace_bytes=trace_bytes,
        )
        scope = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with scope, socket:
                await membership.run(task_status=task_status)

        await self.nursery.start(run)
        self.at[address] = membership
        return Running(membership, socket, address, scope)

    async def grow(self, count: int) -> list[Running]:
        first = await self.start(0)
        members = [first]
        for number in range(1, count):
            members.append(await self.start(number))
            assert await members[-1].membership.join([first.address]) == 1
        await trio.sleep(2)
        return members


@pytest.fixture(autouse=True)
def arrivals_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel stamps arrivals in real time. While the clock jumps, what a busy machine takes to read them would be seconds
    of lag that the nodes admit, and wait for one another longer."""
    monkeypatch.setattr("membership.shell.datagrams.waited_s", lambda ancillary, now_ns: 0.0)


@asynccontextmanager
async def a_mesh() -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        yield Mesh(nursery)
        nursery.cancel_scope.cancel()


def states(running: Running) -> list[str]:
    return sorted(peer.state.value for peer in running.membership.view.peers.values())


async def until_state(running: Running, node: NodeId, state: PeerState) -> None:
    view = running.membership.view
    while (peer := view.peers.get(node)) is None or peer.state is not state:
        view = await running.membership.changed(view.version)


async def test_joined_nodes_see_one_another_with_names_facts_and_loads(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        members = await mesh.grow(4)
        for running in members:
            running.membership.publish(Facts(http=f"http://{running.membership.me}"))
        await trio.sleep(3)
        for running in members:
            view = running.membership.view
            assert [peer.name for peer in sorted(view.peers.values(), key=lambda peer: peer.id)] == [
                f"node-{n}" for n in range(4)
            ]
            for number, peer in enumerate(sorted(view.peers.values(), key=lambda peer: peer.id)):
                assert peer.facts.http == f"http://{peer.id}"
                assert peer.load == Load(running=number)
                assert trio.current_time() - peer.load_at < 3
                assert peer.rtt_s is None, "a clock that stands still times nothing"


async def test_subscribers_are_called_about_a_killed_node_after_the_view_shows_it(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with a_mesh() as mesh:
        members = await mesh.grow(4)
        victim = members[2].membership.me
        heard: list[tuple[MemberEvent, PeerState]] = []
        watched = members[0].membership
        end = watched.subscribe(lambda event: heard.append((event, watched.view.peers[event.node].state)))
        members[2].kill(mesh)
        killed_at = trio.current_time()
        for running in (members[0], members[1], members[3]):
            running.membership.lost(victim)
        with trio.fail_after(5):
            for running in (members[0], members[1], members[3]):
                await until_state(running, victim, PeerState.DEAD)
        assert trio.current_time() - killed_at < 2.6
        assert [(event.after, shown, event.down) for event, shown in heard] == [
            (PeerState.SUSPECT, PeerState.SUSPECT, False),
            (PeerState.DEAD, PeerState.DEAD, True),
        ]
        end()
        end()
        members[3].kill(mesh)
        await until_state(members[0], members[3].membership.me, PeerState.DEAD)
        assert len(heard) == 2


async def test_nodes_lost_together_are_one_batch_and_freeze_the_view(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with a_mesh() as mesh:
        members = await mesh.grow(6)
        watched = members[0].membership
        await trio.sleep(5)
        cuts: list[tuple[LossBatch, set[PeerState]]] = []
        watched.on_loss_batch = lambda cut: cuts.append((cut, {watched.view.peers[node].state for node in cut.lost}))
        lost = [running.membership.me for running in members[2:]]
        version = watched.view.version
        for running in members[2:]:
            running.kill(mesh)
        while not watched.view.frozen:
            version = (await watched.changed(version)).version
        assert cuts == [], "doubt is enough to hold still"
        with trio.fail_after(30):
            while states(members[0]).count("dead") < 4:
                version = (await watched.changed(version)).version
            await watched.settled()
        assert cuts == [(LossBatch(tuple(sorted(lost))), {PeerState.DEAD})]
        with trio.fail_after(65):
            while watched.view.frozen:
                version = (await watched.changed(version)).version
        statistics = watched.statistics()
        assert (statistics.cuts_total, statistics.freezes_total, statistics.frozen) == (1, 1, False)


async def test_a_view_once_taken_keeps_its_members_while_loads_stay_fresh_in_it(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        members = await mesh.grow(2)
        one, other = members[0].membership, members[1].membership.me
        taken = one.view
        one.note_load(other, Load(running=99))
        assert one.view is taken and taken.peers[other].load == Load(running=99)
        one.note_load(other, Load(running=-5))
        assert taken.peers[other].load == Load(running=99), "a figure that cannot be is not shown"
        await mesh.start(7)
        members[1].kill(mesh)
        await until_state(members[0], other, PeerState.DEAD)
        assert taken.peers[other].state is PeerState.ALIVE and one.view.version > taken.version
        with pytest.raises(TypeError):
            taken.peers[other] = taken.peers[other]  # type: ignore[index]


async def test_nodes_that_leave_are_soon_recorded_as_left_not_dead(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        members = await mesh.grow(3)
        began = trio.current_time()
        await members[1].membership.leave()
        assert trio.current_time() - began <= 1.0
        members[1].kill(mesh)
        with trio.fail_after(0.5):
            await until_state(members[0], members[1].membership.me, PeerState.LEFT)
            await until_state(members[2], members[1].membership.me, PeerState.LEFT)
        await trio.sleep(20)
        assert states(members[0]) == states(members[2]) == ["alive", "alive", "left"]


async def test_a_restarted_node_is_one_member_and_its_event_is_marked_restarted(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with a_mesh() as mesh:
        members = await mesh.grow(3)
        heard: list[MemberEvent] = []
        members[0].membership.subscribe(heard.append)
        members[2].membership.publish(Facts(http="old"))
        await trio.sleep(1)
        members[2].kill(mesh)
        again = await mesh.start(2, epoch=2, name="renamed")
        await again.membership.join([members[0].address])
        await trio.sleep(1)
        peer = members[0].membership.view.peers[again.membership.me]
        assert (peer.name, peer.epoch, peer.address, peer.facts) == ("renamed", 2, again.address, Facts())
        assert [event.restarted and event.down for event in heard] == [True]
        assert len(members[0].membership.view.peers) == 3


async def test_the_join_error_names_each_seed_and_seeds_are_tried_again(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        lonely = await mesh.start(1)
        late = await mesh.start(2)
        del mesh.at[late.address]
        with pytest.raises(JoinFailed) as failed:
            await lonely.membership.join([late.address, ("127.0.0.1", 1)])
        for received in (format_address(late.address), "127.0.0.1:1", "connection refused", "key"):
            assert received in str(failed.value)
        mesh.at[late.address] = late.membership
        with trio.fail_after(20):
            await until_state(lonely, late.membership.me, PeerState.ALIVE)
        assert await late.membership.join([lonely.address, ("127.0.0.1", 1), late.address]) == 1


async def test_recalled_peers_are_found_when_they_return_and_absence_is_no_error(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with a_mesh() as mesh:
        one, other, late = [await mesh.start(number) for number in range(3)]
        del mesh.at[late.address]
        one.membership.recall([one.address, other.address, late.address, ("127.0.0.1", 1)])
        with trio.fail_after(1):
            await until_state(one, other.membership.me, PeerState.ALIVE)
        mesh.at[late.address] = late.membership
        with trio.fail_after(30):
            await until_state(other, late.membership.me, PeerState.ALIVE)


async def test_joining_without_seeds_succeeds_and_joining_before_run_is_a_local_error(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        running = await mesh.start(1)
        assert await running.membership.join([]) == 0
        assert await running.membership.join([running.address]) == 0
        running.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LocalError, match="run"):
            await running.membership.join([("127.0.0.1", 1)])


async def test_strangers_garbage_and_other_keys_are_dropped_and_counted(autojump_clock: trio.abc.Clock) -> None:
    key, other = KeySeal([b"k" * 32]), KeySeal([b"o" * 32])
    async with a_mesh() as mesh:
        node = await mesh.start(1, seal=key)
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as stranger:
            foreign = [b"", b"garbage", b"x" * (MAX_DATAGRAM_BYTES + 1), b"y" * 9000]
            twice = key.seal(b"not a message")
            for datagram in [*foreign, other.seal(b"x"), key.seal(b"not a message"), twice, twice]:
                await stranger.sendto(datagram, node.address)
        await trio.sleep(1)
        dropped = dict(node.membership.statistics().datagrams_dropped_total)
        assert dropped == {"foreign": 2, "too long": 2, "wrong key": 1, "malformed": 2, "replayed or too old": 1}
        assert len(node.membership.view.peers) == 1


@pytest.mark.parametrize("host", ["\0", "", "name.invalid", "127.0.0.1 "])
async def test_nothing_is_looked_up_for_a_claimed_host_and_none_ends_the_node(host: str, autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        node = await mesh.start(1)
        liar = NodeId("f" * 16)
        claim = signed(Alive(liar, 1, 0, "liar", host, 7946))
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as stranger:
            await stranger.sendto(PlainSeal().seal(encode(Gossip(Sender(liar, 1, 0, 1), (claim,)))), node.address)
        await until_state(node, liar, PeerState.DEAD)
        statistics = node.membership.statistics()
        assert statistics.datagrams_sent_total == 0 < statistics.datagrams_dropped_total["unsent"]


async def test_nodes_with_one_key_form_a_mesh_with_encrypted_datagrams(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        first = await mesh.start(1, seal=KeySeal([b"k" * 32]))
        second = await mesh.start(2, seal=KeySeal([b"k" * 32]))
        await second.membership.join([first.address])
        await trio.sleep(5)
        assert states(first) == states(second) == ["alive", "alive"]
        assert not dict(first.membership.statistics().datagrams_dropped_total)


async def test_malformed_syncs_are_bad_requests_and_malformed_answers_remote_errors(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with a_mesh() as mesh:
        one, other = await mesh.start(1), await mesh.start(2)
        with pytest.raises(BadRequest):
            await one.membership.handlers[SYNC_KIND](other.membership.me, {}, b"\xc1")
        mesh.garbled = True
        with pytest.raises(JoinFailed, match="not a membership sync"):
            await one.membership.join([other.address])


async def test_a_starved_loop_reads_what_is_ready_before_its_timers_accuse_anybody(mock_clock: trio.testing.MockClock) -> None:
    async with a_mesh() as mesh:
        one, other = await mesh.start(1), await mesh.start(2)
        await other.membership.join([one.address])
        heard: list[MemberEvent] = []
        one.membership.subscribe(heard.append)
        other.membership.subscribe(heard.append)
        for step_s in ([0.1] * 7 + [30.0]) * 5 + [0.1] * 60:
            mock_clock.jump(step_s)
            await trio.testing.wait_all_tasks_blocked()
        assert [event for event in heard if event.after is not PeerState.ALIVE] == []
        assert one.membership.statistics().swim.sleeps_total >= 5
        assert one.membership.statistics().swim.probes_total > 10


async def test_an_ack_that_is_ready_when_the_timer_fires_is_in_time(mock_clock: trio.testing.MockClock) -> None:
    """Eight rounds, for trio wakes the reader and the timer in random order: without the drain some round would fail."""
    seal = PlainSeal()
    async with a_mesh() as mesh:
        node = await mesh.start(1)
        with stdlib_socket.socket(stdlib_socket.AF_INET, stdlib_socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0))
            peer.settimeout(1.0)  # only a failing test waits
            me = NodeId("2" * 16)
            host, port = peer.getsockname()
            by = Sender(me, 1, 0, 0)
            peer.sendto(seal.seal(encode(Gossip(by, (signed(Alive(me, 1, 0, "peer", host, port)),)))), node.address)
            await trio.testing.wait_all_tasks_blocked()
            while node.membership.statistics().swim.probes_total == 0:
                mock_clock.jump(0.05)
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(8):  # each probe is over when the next begins
                sent_at = trio.current_time()
                while not isinstance(ping := decode(seal.open(peer.recv(2000))), Ping):
                    pass
                for _ in range(4):
                    mock_clock.jump(0.1)
                    await trio.testing.wait_all_tasks_blocked()
                peer.sendto(seal.seal(encode(Ack(by, ping.seq))), node.address)
                mock_clock.jump(sent_at + 0.5 - trio.current_time() + 0.001)
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(0.3)
                await trio.testing.wait_all_tasks_blocked()
                assert node.membership.view.peers[me].state is PeerState.ALIVE
        assert node.membership.statistics().swim.probes_failed_total == 0


async def test_statistics_count_what_happened(autojump_clock: trio.abc.Clock) -> None:
    async with a_mesh() as mesh:
        members = await mesh.grow(3)
        await trio.sleep(5)
        stats = members[0].membership.statistics()
        assert dict(stats.members) == {"alive": 3, "suspect": 0, "dead": 0, "left": 0}
        assert (
            stats.datagrams_sent_total > 10
            and stats.datagrams_received_total > 10
            and stats.bytes_sent_total > stats.datagrams_sent_total * 50
        )
        assert stats.swim.probes_total >= 6 and stats.swim.probes_failed_total == 0
        assert stats.view_version == members[0].membership.view.version


async def test_a_name_that_fits_no_claim_is_refused_at_the_start() -> None:
    async def call(to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0) -> CallReply:
        raise AssertionError("nobody is called")

    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as socket:
        with pytest.raises(ValueError, match="name may take 32 bytes"):
            me, at = NodeId("1" * 16), ("127.0.0.1", 1)
            Membership(me, "n" * 33, "", 1, signer=StandInSigner(me), socket=socket, address=at, seal=PlainSeal(), call=call)
