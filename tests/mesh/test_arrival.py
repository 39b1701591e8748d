"""The kernel's evidence: when a datagram arrived, and whether a process listens at a port."""

from __future__ import annotations

import socket
import struct
import sys

import pytest
import trio

from mesh.links.arrival import ANCILLARY_BYTES, stamp_arrivals, waited_s
from mesh.links.connect_check import is_refused

NOW_NS = 1_700_000_000_000_000_000


def stamp(ago_s: float) -> list[tuple[int, int, bytes]]:
    at_ns = NOW_NS - int(ago_s * 1e9)
    return [(socket.SOL_SOCKET, 35, struct.pack("@qq", at_ns // 10**9, at_ns % 10**9))]


def test_the_age_of_a_datagram_is_read_from_its_stamp() -> None:
    assert waited_s(stamp(0.405), NOW_NS) == pytest.approx(0.405)


@pytest.mark.parametrize("ancillary", [[], stamp(-1.0), stamp(3600.0), [(socket.SOL_SOCKET, 35, b"short")], [(0, 35, b"x" * 16)]])
def test_without_a_stamp_that_can_be_nothing_has_waited(ancillary: list[tuple[int, int, bytes]]) -> None:
    assert waited_s(ancillary, NOW_NS) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux stamps datagrams this way")
def test_the_kernel_stamps_what_it_receives() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        receiver.bind(("127.0.0.1", 0))
        assert stamp_arrivals(receiver)
        sender.sendto(b"x", receiver.getsockname())
        _, ancillary, _, _ = receiver.recvmsg(10, ANCILLARY_BYTES)
        seconds, nanoseconds = struct.unpack("@qq", ancillary[0][2])
        arrived_ns = seconds * 10**9 + nanoseconds
        assert waited_s(ancillary, arrived_ns + 250_000_000) == pytest.approx(0.25)


async def test_a_port_refuses_exactly_when_no_process_listens_there() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listeners[0].socket.getsockname()[:2]
    assert await is_refused(address) is False, "also when no connection is accepted: the process exists"
    await listeners[0].aclose()
    assert await is_refused(address) is True


async def test_silence_is_neither(autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*address: object) -> trio.SocketStream:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(trio, "open_tcp_stream", never)
    assert await is_refused(("192.0.2.1", 1)) is None
