"""What a node remembers of where its peers were."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from mesh.ids import NodeId
from mesh.view import Peer, PeerState, View
from node.host.known_peers import FILE, FORGET_S, MAX_PEERS, KnownPeers

ME = NodeId("0" * 16)


def view(*peers: tuple[int, PeerState]) -> View:
    known = {NodeId(f"{n:016x}"): Peer(NodeId(f"{n:016x}"), f"n{n}", ("10.0.0.1", 7000 + n), state=state) for n, state in peers}
    me = Peer(ME, "me", ("10.0.0.1", 7000))
    return View(ME, MappingProxyType({ME: me, **known}))


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def test_a_restarted_node_knows_the_living_and_the_dead_but_not_itself_nor_who_left(tmp_path: Path) -> None:
    clock = Clock()
    known = KnownPeers(tmp_path, clock)
    assert known.addresses() == []
    assert known.note(view((1, PeerState.ALIVE), (2, PeerState.SUSPECT), (3, PeerState.ALIVE)))
    assert known.note(view((1, PeerState.DEAD), (2, PeerState.ALIVE), (3, PeerState.LEFT)))
    assert sorted(KnownPeers(tmp_path, clock).addresses()) == [("10.0.0.1", 7001), ("10.0.0.1", 7002)]


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    clock = Clock()
    known = KnownPeers(tmp_path, clock)
    known.note(view((1, PeerState.ALIVE)))
    (tmp_path / FILE).unlink()
    clock.now += 10
    assert not known.note(view((1, PeerState.ALIVE)))
    assert not (tmp_path / FILE).exists()


def test_who_was_not_seen_for_three_days_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    known = KnownPeers(tmp_path, clock)
    known.note(view((1, PeerState.ALIVE), (2, PeerState.ALIVE)))
    clock.now += FORGET_S / 2
    known.note(view((1, PeerState.DEAD), (2, PeerState.ALIVE)))
    clock.now += FORGET_S / 2 + 1
    assert KnownPeers(tmp_path, clock).addresses() == [("10.0.0.1", 7002)]


def test_the_file_is_bounded_and_a_damaged_one_is_an_empty_one(tmp_path: Path) -> None:
    clock = Clock()
    known = KnownPeers(tmp_path, clock)
    known.note(view(*((n, PeerState.ALIVE) for n in range(1, MAX_PEERS + 100))))
    assert len(KnownPeers(tmp_path, clock).addresses()) == MAX_PEERS
    for damage in (b"", b"{", b"[]", b'{"x": 1}', b'{"x": ["h", 99999999, 1e9]}'):
        (tmp_path / FILE).write_bytes(damage)
        assert KnownPeers(tmp_path, clock).addresses() == []


def test_a_clock_that_once_ran_ahead_keeps_nobody_for_ever(tmp_path: Path) -> None:
    clock = Clock()
    clock.now += 10 * 365 * 86400
    KnownPeers(tmp_path, clock).note(view((1, PeerState.ALIVE), (2, PeerState.ALIVE)))
    clock.now = Clock.now
    known = KnownPeers(tmp_path, clock)
    for _ in range(8):
        clock.now += FORGET_S / 6
        known.note(view((1, PeerState.DEAD), (2, PeerState.ALIVE)))
    assert known.addresses() == KnownPeers(tmp_path, clock).addresses() == [("10.0.0.1", 7002)]


def test_a_clock_that_is_set_back_while_the_node_runs_keeps_nobody_for_ever_either(tmp_path: Path) -> None:
    clock = Clock()
    known = KnownPeers(tmp_path, clock)
    known.note(view((1, PeerState.ALIVE)))
    clock.now -= 10 * 365 * 86400
    known.note(view((1, PeerState.DEAD)))
    clock.now += FORGET_S + 1
    known.note(view((1, PeerState.DEAD)))
    assert known.addresses() == []
