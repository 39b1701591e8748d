"""One member of a mesh and nothing else: links and membership in a process of its own, for measuring.

`python -m bench.member [HOST]` reads one address to join per line on stdin, or `block SECONDS`, which blocks its event loop for
so long; prints a JSON line for its address and for each change of a member, with the machine's monotonic clock, which all
processes share.
"""

from __future__ import annotations

import json
import secrets
import sys
import time

import trio

from membership.shell.events import JoinFailed, MemberEvent
from membership.shell.service import Membership
from mesh.ids import format_address, parse_address
from mesh.keys.seal import KeySeal
from mesh.keys.signing import IdentityKey
from mesh.links.link import LinkConfig
from mesh.links.links import Links
from mesh.links.tls import PeerTls
from node.host.sockets import open_peer_sockets

MESH_KEY = bytes(range(32))


def say(**fields: object) -> None:
    print(json.dumps({"at": time.monotonic(), **fields}), flush=True)


async def run() -> None:
    """Until stdin ends."""
    sockets = await open_peer_sockets((sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1", 0))
    identity = IdentityKey(secrets.token_bytes(32))
    me = identity.node
    config = LinkConfig(me, sockets.address, "mesh", PeerTls([MESH_KEY], identity))
    links = Links(
        config,
        on_lost=lambda node, address, reason: membership.lost(node, proven=True) if node is not None else None,
        on_linked=lambda node: membership.linked(node),
    )
    membership = Membership(
        me,
        me[:8],
        "",
        1,
        signer=identity,
        socket=sockets.datagrams,
        address=sockets.address,
        seal=KeySeal([MESH_KEY]),
        call=links.call,
        keep_links=links.keep,
    )
    links.add(membership.handlers)
    membership.subscribe(lambda event: say(node=event.node, state=event.after.value, cause=cause_of(membership, event)))
    async with trio.open_nursery() as nursery:
        await nursery.start(links.run, sockets.listener)
        await nursery.start(membership.run)
        say(me=me, address=format_address(sockets.address))
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            if line.startswith("block "):
                time.sleep(float(line.split()[1]))  # noqa: ASYNC251 - a loop that stands still is what is asked for
                continue
            try:
                await membership.join([parse_address(line.strip())])
            except JoinFailed as error:
                say(failed=str(error))
        say(bytes_sent=membership.statistics().bytes_sent_total)
        nursery.cancel_scope.cancel()


def cause_of(membership: Membership, event: MemberEvent) -> str:
    return membership.view.peers[event.node].cause


if __name__ == "__main__":
    trio.run(run)
