"""One member of a kinship cluster, speaking as `bench.member` does. Runs in the environment of `make bench-peers`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import kinship

STATES = {
    "MemberJoined": "alive",
    "MemberRecovered": "alive",
    "MemberSuspect": "suspect",
    "MemberDead": "dead",
    "MemberLeft": "left",
}


def say(**fields: Any) -> None:
    print(json.dumps({"at": time.monotonic(), **fields}), flush=True)


async def tell(cluster: Any) -> None:
    async for event in cluster.events():
        if (state := STATES.get(type(event).__name__)) is not None:
            say(node=event.member.name, state=state, cause="")


async def run() -> None:
    """Until stdin ends. `lan` is the configuration that its authors publish figures for."""
    config = kinship.Config.lan(bind="127.0.0.1:0", insecure_plaintext=True)
    async with kinship.Cluster(config) as cluster:
        telling = asyncio.create_task(tell(cluster))
        await asyncio.sleep(0.1)
        me = cluster.local
        me = me() if callable(me) else me
        say(me=me.name, address=f"{me.addr}" if isinstance(me.addr, str) else f"{me.addr[0]}:{me.addr[1]}")
        while line := await asyncio.to_thread(sys.stdin.readline):
            await cluster.join([line.strip()])
        telling.cancel()


if __name__ == "__main__":
    asyncio.run(run())
