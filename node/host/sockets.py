"""The node's listening sockets, taken before anything else: a port in use is known at once."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

import trio

from mesh.errors import BadRequest
from mesh.ids import Address, format_address

# Of networks for documentation (RFC 5737, RFC 3849): the route to them is the default route. Nothing is sent there.
FAR_AWAY = {trio.socket.AF_INET: ("192.0.2.1", 9), trio.socket.AF_INET6: ("2001:db8::1", 9)}
PAIR_TRIES = 50  # a free TCP port whose UDP twin is taken: another one


@dataclass(frozen=True, slots=True)
class PeerSockets:
    """Gossip and links under one port number. `address`: what peers reach them by."""

    listener: trio.SocketListener
    datagrams: trio.socket.SocketType
    address: Address


async def open_peer_sockets(bind: Address, seeds: Sequence[Address] = ()) -> PeerSockets:
    """TCP and UDP on `bind`; port 0 finds a number that is free for both. `seeds`: nodes that will be joined.

    Raises:
        BadRequest: the address is in use or not this machine's.
    """
    port = bind[1]
    for attempt in range(PAIR_TRIES):
        listener = await open_listener(bind, "--bind")
        address: Address = listener.socket.getsockname()[:2]
        datagrams = trio.socket.socket(listener.socket.family, trio.socket.SOCK_DGRAM)
        try:
            await datagrams.bind(address)
            return PeerSockets(listener, datagrams, await reachable(address, seeds))
        except OSError as error:
            datagrams.close()
            await listener.aclose()
            if port or attempt == PAIR_TRIES - 1 or error.errno != errno.EADDRINUSE:
                raise _cannot_listen(bind, "--bind", error) from None
    raise AssertionError("the loop returns or raises")


async def reachable(bound: Address, seeds: Sequence[Address] = ()) -> Address:
    """`bound` as others can use it: for a wildcard (0.0.0.0, ::) this machine's own address on the way to the seeds."""
    host, port = bound
    if not ip_address(host).is_unspecified:
        return bound
    family = trio.socket.AF_INET6 if ":" in host else trio.socket.AF_INET
    for destination in (*seeds, FAR_AWAY[family]):
        with trio.socket.socket(family, trio.socket.SOCK_DGRAM) as probe:
            try:
                await probe.connect(destination)  # of a datagram socket: only picks a route
            except (OSError, UnicodeError):
                continue
            own: str = probe.getsockname()[0]
            return own, port
    return ("::1" if family == trio.socket.AF_INET6 else "127.0.0.1"), port


async def open_listener(bind: Address, option: str) -> trio.SocketListener:
    """Raises BadRequest naming the option and what is wrong with the address."""
    host, port = bind
    try:
        listeners = await trio.open_tcp_listeners(port, host=host, backlog=1024)
    except OSError as error:
        raise _cannot_listen(bind, option, error) from None
    for other in listeners[1:]:
        await other.aclose()
    return listeners[0]


def _cannot_listen(bind: Address, option: str, error: OSError) -> BadRequest:
    reason = "the port is in use; take another, or 0 for any free one" if error.errno == errno.EADDRINUSE else str(error.strerror)
    return BadRequest(f"{option} {format_address(bind)}: cannot listen there: {reason}", option.strip("-"))
