"""The mesh key of running nodes: rotated over real links on loopback, with nodes that die, hang, or come too late."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest
import trio
import trio.testing

from mesh.errors import BadRequest, MeshError, PeerLost, Refused
from mesh.ids import NodeId
from mesh.keys.keyring import Keyring, RingKey, load_keyring, save_keyring
from mesh.keys.seal import KeySeal, SealBroken, SealFault
from mesh.keys.signing import IdentityKey
from mesh.links.link import LinkConfig
from mesh.links.links import Links
from mesh.links.tls import PeerTls
from mesh.view import Peer, PeerState, View
from mesh.wire.calls import CallReply, Header
from node.ops import keys as module
from node.ops.keys import KIND, MeshKeys

OLD = RingKey(0, b"o" * 32)
ECHO = "echo"


@dataclass
class Running:
    identity: IdentityKey
    keys: MeshKeys
    links: Links
    seal: KeySeal
    path: Path
    dropped: Counter[SealFault] = field(default_factory=Counter)

    @property
    def id(self) -> NodeId:
        return self.identity.node


class Mesh:
    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self.nursery, self.directory = nursery, directory
        self.nodes: list[Running] = []
        self.states: dict[NodeId, PeerState] = {}

    def view(self, me: NodeId) -> View:
        peers = {
            node.id: Peer(node.id, f"node-{number}", node.links.config.address, state=self.states[node.id])
            for number, node in enumerate(self.nodes)
        }
        return View(me, MappingProxyType(peers))

    async def start(self, ring: Keyring | None = None) -> Running:
        ring = ring or Keyring((OLD,))
        number = len(self.nodes)
        identity, path = IdentityKey(bytes([number + 1]) * 32), self.directory / f"{number}.key"
        save_keyring(path, ring)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        tls, seal = PeerTls(ring.secrets, identity), KeySeal(ring.secrets)
        links = Links(LinkConfig(identity.node, listener.socket.getsockname()[:2], "mesh", tls))
        keys = MeshKeys(ring, path, seal, tls, lambda: self.view(identity.node), links.call)

        async def echo(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            return {}, tail

        links.add({ECHO: echo, **keys.handlers})
        await self.nursery.start(links.run, listener)
        node = Running(identity, keys, links, seal, path)
        self.states[node.id] = PeerState.ALIVE
        self.nodes.append(node)
        return node

    def check_datagrams(self) -> None:
        """What any node seals now, every node opens now."""
        for sender in self.nodes:
            for reader in self.nodes:
                assert reader.seal.open(sender.seal.seal(b"news")) == b"news"


@asynccontextmanager
async def a_mesh(directory: Path, nodes: int = 3) -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        mesh = Mesh(nursery, directory)
        for _ in range(nodes):
            await mesh.start()
        yield mesh
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real sockets want real time: as little of it as will do."""
    for name, value in (("LINGER_S", 0.1), ("RETRY_S", 0.02), ("PATIENCE_S", 0.3), ("LOOK_S", 0.02), ("CALL_S", 0.5)):
        monkeypatch.setattr(module, name, value)


async def test_a_rotation_under_a_stream_of_calls_and_datagrams_refuses_none(tmp_path: Path) -> None:
    async with a_mesh(tmp_path) as mesh:
        kept = mesh.nodes[0]
        await kept.links.call(mesh.nodes[1].links.config.address, ECHO, {}, b"before")
        opened = kept.links.counters.links_opened_total
        calls = 0
        rotated = trio.Event()

        async def traffic() -> None:
            nonlocal calls
            while not rotated.is_set():
                for caller in mesh.nodes:
                    for callee in mesh.nodes:
                        _, tail = await caller.links.call(callee.links.config.address, ECHO, {}, b"x", timeout_s=5)
                        assert tail == b"x"
                        calls += 1
                mesh.check_datagrams()

        async def fresh_links() -> None:
            """A node's links are made anew in every phase, too."""
            while not rotated.is_set():
                for node in mesh.nodes:
                    tls = node.links.config.tls
                    probe = Links(LinkConfig(node.id, ("", 0), "mesh", tls))
                    async with trio.open_nursery() as nursery:
                        probe._nursery = nursery
                        for peer in mesh.nodes:
                            await probe.call(peer.links.config.address, ECHO, {}, b"y", timeout_s=5)
                        nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(traffic)
            nursery.start_soon(fresh_links)
            done = await mesh.nodes[1].keys.rotate()
            rotated.set()
        assert done.nodes == sorted(node.id for node in mesh.nodes) and done.not_saved == [] and not done.finished_earlier
        assert {node.keys.ring.tags for node in mesh.nodes} == {mesh.nodes[0].keys.ring.tags}
        assert all(load_keyring(node.path) == node.keys.ring != Keyring((OLD,)) for node in mesh.nodes)
        assert calls > 9 and kept.links.counters.links_lost_total == 0 and kept.links.counters.links_opened_total >= opened
        with pytest.raises(SealBroken):
            kept.seal.open(KeySeal([OLD.secret]).seal(b"too late"))


async def test_two_rotations_at_once_end_under_one_key(tmp_path: Path) -> None:
    async with a_mesh(tmp_path) as mesh:
        async with trio.open_nursery() as nursery:
            for node in mesh.nodes[:2]:
                nursery.start_soon(node.keys.rotate)
        mesh.check_datagrams()
        assert {node.keys.ring.tags for node in mesh.nodes} == {mesh.nodes[0].keys.ring.tags}
        assert len(mesh.nodes[0].keys.ring.keys) == 1


async def test_one_node_runs_one_rotation_at_a_time(tmp_path: Path) -> None:
    async with a_mesh(tmp_path) as mesh, trio.open_nursery() as nursery:
        nursery.start_soon(mesh.nodes[0].keys.rotate)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Refused, match="under way"):
            await mesh.nodes[0].keys.rotate()


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.2])
async def test_a_rotation_that_was_cut_off_anywhere_is_ended_from_any_node(tmp_path: Path, after_s: float) -> None:
    async with a_mesh(tmp_path) as mesh:
        with trio.move_on_after(after_s):
            await mesh.nodes[0].keys.rotate()
        mesh.check_datagrams()
        await mesh.nodes[2].keys.rotate()
        mesh.check_datagrams()
        assert {len(node.keys.ring.keys) for node in mesh.nodes} == {1}
        assert mesh.nodes[0].keys.ring.sealing > OLD.tag


async def test_a_node_that_hangs_stops_the_rotation_before_anything_is_lost_and_its_death_lets_it_go_on(tmp_path: Path) -> None:
    async with a_mesh(tmp_path) as mesh:
        silent = mesh.nodes[2]

        async def hang(*_: object) -> tuple[dict[str, object], bytes]:
            await trio.sleep_forever()
            raise AssertionError

        silent.links.handlers[KIND] = hang
        with pytest.raises(BadRequest, match="node-2"):
            await mesh.nodes[0].keys.rotate()
        mesh.check_datagrams()
        mesh.states[silent.id] = PeerState.DEAD
        await mesh.nodes[0].keys.rotate()
        assert mesh.nodes[1].keys.ring.tags == mesh.nodes[0].keys.ring.tags
        assert silent.keys.ring == Keyring((OLD,))


async def test_a_node_that_dies_between_two_phases_does_not_hold_the_others_up(tmp_path: Path) -> None:
    async with a_mesh(tmp_path) as mesh:
        dying = mesh.nodes[2]
        answer = dying.links.handlers[KIND]

        async def die_when_told_to_use_it(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            if header["do"] == "use":
                mesh.states[dying.id] = PeerState.DEAD
                raise PeerLost("node-2", "gone")
            return await answer(sender, header, tail)

        dying.links.handlers[KIND] = die_when_told_to_use_it
        done = await mesh.nodes[0].keys.rotate()
        assert done.nodes == sorted(node.id for node in mesh.nodes[:2])
        kept = load_keyring(dying.path)
        assert kept.sealing == OLD.tag and len(kept.keys) == 2, "it comes back with both, and reads the others"


async def test_a_node_that_was_away_is_let_in_by_the_old_key_and_catches_up_by_itself(tmp_path: Path) -> None:
    async with a_mesh(tmp_path, nodes=1) as mesh:
        first = mesh.nodes[0]
        new = first.keys.ring.successor()
        first.keys._change(first.keys.ring.add(new).use(new.tag))  # in the midst of a rotation
        late = await mesh.start(Keyring((OLD,)))
        assert first.seal.open(late.seal.seal(b"hello")) == b"hello"
        with pytest.raises(SealBroken) as refused:
            late.seal.open(first.seal.seal(b"news"))
        late.dropped[refused.value.fault] += 1
        mesh.nursery.start_soon(late.keys.run, lambda fault: late.dropped[fault])
        with trio.fail_after(5):
            while late.keys.ring.sealing != new.tag:
                await trio.sleep(0.01)
        mesh.check_datagrams()
        assert load_keyring(late.path) == late.keys.ring


@pytest.mark.parametrize("fault", [SealFault.WRONG_KEY, SealFault.DAMAGED])
async def test_a_running_node_that_missed_a_key_catches_up_once_it_cannot_read_a_datagram(
    tmp_path: Path, fault: SealFault
) -> None:
    async with a_mesh(tmp_path, nodes=2) as mesh:
        first, second = mesh.nodes
        asked = trio.Event()
        answer = first.links.handlers[KIND]

        async def note(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            asked.set()
            return await answer(sender, header, tail)

        first.links.handlers[KIND] = note
        mesh.nursery.start_soon(second.keys.run, lambda fault: second.dropped[fault])
        with trio.fail_after(5):
            await asked.wait()  # when it started, there was nothing to be had
        new = first.keys.ring.successor()
        first.keys._change(first.keys.ring.add(new).use(new.tag))
        second.dropped[fault] += 1
        with trio.fail_after(5):
            while second.keys.ring.sealing != new.tag:
                await trio.sleep(0.01)


async def test_a_key_file_that_cannot_be_written_is_told_and_the_node_goes_on(tmp_path: Path) -> None:
    async with a_mesh(tmp_path) as mesh:
        read_only = mesh.nodes[1]
        read_only.keys._path = tmp_path / "absent" / "key"
        done = await mesh.nodes[0].keys.rotate()
        assert done.not_saved == [read_only.id]
        assert read_only.keys.ring == mesh.nodes[0].keys.ring and not read_only.keys.saved
        mesh.check_datagrams()


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"do": "burn"},
        {"do": "add"},
        {"do": "add", "serial": "1", "name": "x"},
        {"do": "add", "serial": 2**40, "name": "0a0a0a0a"},
        {"do": "add", "serial": 1, "name": "0a0a0a0a", "under": "unknown!"},
        {"do": "add", "serial": 1, "name": "0a0a0a0a", "under": OLD.tag.name},
        {"do": "use", "serial": 1, "name": "0a0a0a0a", "under": ""},
        {"do": "drop", "serial": 1, "name": "0a0a0a0a"},
        {"do": "drop", "serial": -1, "name": None},
    ],
)
async def test_a_malformed_step_is_the_callers_fault_and_changes_nothing(tmp_path: Path, header: dict[str, object]) -> None:
    async with a_mesh(tmp_path, nodes=2) as mesh:
        with pytest.raises(MeshError):
            await mesh.nodes[0].links.call(mesh.nodes[1].links.config.address, KIND, header, b"x" * 60)
        assert mesh.nodes[1].keys.ring == Keyring((OLD,))


@pytest.mark.parametrize("told", [None, "x", [], [[1]], [["1", "0a0a0a0a"]], [[1, "short"]], [[0, "0a0a0a0a"]] * 9])
async def test_an_answer_that_names_no_ring_counts_as_none(tmp_path: Path, told: object) -> None:
    async with a_mesh(tmp_path, nodes=2) as mesh:

        async def lie(*_: object) -> tuple[dict[str, object], bytes]:
            return {"ring": told}, b""

        mesh.nodes[1].links.handlers[KIND] = lie
        with pytest.raises(BadRequest, match="node-1"):
            await mesh.nodes[0].keys.rotate()
        assert mesh.nodes[0].keys.ring == Keyring((OLD,))
