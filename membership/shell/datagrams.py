"""Sealed gossip on a datagram socket that is read and written without ever waiting; what is lost or refused is counted."""

from __future__ import annotations

import os
import socket as stdlib_socket
import time
from collections import Counter
from collections.abc import Iterator

import structlog
import trio

from mesh.ids import Address, is_ip
from mesh.keys.seal import Seal, SealBroken, SealFault
from mesh.links.arrival import ANCILLARY_BYTES, stamp_arrivals, waited_s
from mesh.links.refusals import WINDOW_S, Refusals
from mesh.wire import datagram_codec, gossip

log = structlog.get_logger()

MAX_DRAIN = 512  # datagrams read in one go before timers and other tasks get a turn


class Datagrams:
    """A datagram socket of sealed messages. Closed at first; may be opened again after `close`."""

    def __init__(self, socket: trio.socket.SocketType, seal: Seal) -> None:
        self._bound = socket
        self._seal = seal
        self._socket: stdlib_socket.socket | None = None
        self.sent = self.received = self.bytes_sent = self.bytes_received = 0
        self.dropped: Counter[str] = Counter()
        self.refusals = Refusals()

    def open(self) -> None:
        """Duplicates the descriptor of the bound socket."""
        self._socket = stdlib_socket.socket(fileno=os.dup(self._bound.fileno()))
        self._socket.setblocking(False)
        stamp_arrivals(self._socket)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def refused(self, fault: SealFault) -> int:
        """Returns how many datagrams were not opened for this reason, since the start."""
        return self.dropped[fault.value]

    async def wait_readable(self) -> None:
        assert self._socket is not None, "open comes first"
        await trio.lowlevel.wait_readable(self._socket)

    def send(self, to: Address, message: gossip.GossipMessage) -> None:
        """Sends a datagram without waiting. A full socket buffer or a missing route loses it."""
        if self._socket is None:
            return
        if not is_ip(to[0]):  # claims hold IP addresses; a host name would block the event loop in a look-up
            self.dropped["unsent"] += 1
            return
        datagram = self._seal.seal(datagram_codec.encode(message))
        assert len(datagram) <= gossip.MAX_DATAGRAM_BYTES, "the core packs claims within the limit"
        try:
            self._socket.sendto(datagram, to)
        except OSError:
            self.dropped["unsent"] += 1
            return
        self.sent += 1
        self.bytes_sent += len(datagram)

    def drain(self) -> Iterator[tuple[Address, gossip.GossipMessage, float]]:
        """Yields source, message and seconds spent in the socket of each ready datagram; up to `MAX_DRAIN` reads."""
        for _ in range(MAX_DRAIN):
            if self._socket is None:
                return
            try:
                datagram, ancillary, _, source = self._socket.recvmsg(gossip.MAX_DATAGRAM_BYTES + 1, ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                # An ICMP error about a datagram sent earlier, which was lost.
                self.dropped["network"] += 1
                continue
            self.received += 1
            self.bytes_received += len(datagram)
            message = self._opened(datagram, source[0])
            if message is not None:
                yield (source[0], source[1]), message, waited_s(ancillary, time.time_ns())

    def _opened(self, datagram: bytes, host: str) -> gossip.GossipMessage | None:
        reason = "malformed"
        if len(datagram) > gossip.MAX_DATAGRAM_BYTES:
            self._refuse(host, "too long")
            return None
        try:
            return datagram_codec.decode(self._seal.open(datagram))
        except SealBroken as error:
            reason = error.fault.value
        except gossip.BadDatagram:
            pass
        self._refuse(host, reason)
        return None

    def _refuse(self, host: str, reason: str) -> None:
        self.dropped[reason] += 1
        if self.refusals.note(host, reason, trio.current_time()):
            log.warning("datagram.refused", host=host, reason=reason, next_in_s=WINDOW_S)
