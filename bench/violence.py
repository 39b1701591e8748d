"""Strikes at the stages of a mesh on this machine, one after another: SIGKILL and restart, or SIGSTOP and SIGCONT.

The next strike waits until the mesh is whole again: every layer held twice, all nodes alive, a canary token through.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
import trio

from cli.local_mesh import LocalMesh, LocalNode, NodeFailed

ENTRY = "entry"
STAGES = {"a": ("--layers", "0:4"), "b": ("--layers", "2:6"), "c": ("--layers", "0:2,4:6")}  # every layer twice, no node whole
WHOLE_WITHIN_S = 60.0
STOPPED_S = (0.3, 6.0)  # shorter than membership's verdict, and longer
QUIET_S = (0.2, 2.0)  # between the mesh being whole and the next strike


class NotWhole(NodeFailed):
    """The mesh did not become whole again in time, or did not come to rest; the message says what was seen last."""


@dataclass(frozen=True, slots=True)
class Strike:
    """What was done to a node. Times on trio's clock: `at_s` the signal, `whole_at_s` the mesh whole again."""

    node: str
    with_signal: signal.Signals
    at_s: float
    whole_at_s: float


@dataclass(slots=True)
class Violence:
    """The mesh under attack. `hang_ups`: clients that want to hang up at the moment of the next strike."""

    mesh: LocalMesh
    entry: LocalNode
    stages: dict[str, LocalNode]
    http: httpx.AsyncClient
    rng: Random
    strikes: list[Strike] = field(default_factory=list)
    hang_ups: list[trio.CancelScope] = field(default_factory=list)

    async def run(self, stop_share: float, until_s: float) -> None:
        """Strikes until `until_s`, and leaves the mesh whole. `stop_share`: of the strikes, those that only stop a node.

        Raises:
            NotWhole
        """
        while True:
            await trio.sleep(self.rng.uniform(*QUIET_S))
            if trio.current_time() >= until_s:
                return
            busy = [name for name, held in (await self._held()).items() if name in self.stages and held.get("running")]
            name = self.rng.choice(sorted(busy or self.stages))
            with_signal = signal.SIGSTOP if self.rng.random() < stop_share else signal.SIGKILL
            at_s = trio.current_time()
            await (self._stop(name) if with_signal is signal.SIGSTOP else self._kill(name))
            await self.whole()
            self.strikes.append(Strike(name, with_signal, at_s, trio.current_time()))

    async def _kill(self, name: str) -> None:
        self._hang_up(before=True)
        self.mesh.kill(self.stages[name])
        self._hang_up(before=False)
        await trio.sleep(self.rng.uniform(0.0, 1.0))  # sometimes it is back before membership has buried it
        self.stages[name] = self.mesh.launch(name, *STAGES[name])
        await trio.to_thread.run_sync(self.mesh.wait_announced, self.stages[name])

    async def _stop(self, name: str) -> None:
        self.mesh.kill(self.stages[name], signal.SIGSTOP)
        self._hang_up(before=False)
        await trio.sleep(self.rng.uniform(*STOPPED_S))
        self.mesh.kill(self.stages[name], signal.SIGCONT)

    def _hang_up(self, *, before: bool) -> None:
        """Some clients are gone a moment before the strike, the others a moment after it."""
        for scope in list(self.hang_ups):
            if not before or self.rng.random() < 0.5:
                scope.cancel()
                self.hang_ups.remove(scope)

    async def whole(self) -> None:
        """Raises NotWhole."""
        missing = ""
        with trio.move_on_after(WHOLE_WITHIN_S):
            # Nobody tells from outside when a mesh is whole: looking is all there is.
            while missing := await self._what_is_missing():  # noqa: ASYNC110
                await trio.sleep(0.05)
            return
        logs = "\n".join(f"--- {node.name}\n{node.log_tail()}" for node in (self.entry, *self.stages.values()))
        raise NotWhole(f"the mesh was not whole again within {WHOLE_WITHIN_S:g} s: {missing}\n{logs}")

    async def _what_is_missing(self) -> str:
        for node in (self.entry, *self.stages.values()):
            status = (await self.http.get(f"{node.http}/mesh/status")).json()
            alive = sum(peer["state"] == "alive" for peer in status["nodes"])
            replicas = min((model["min_replicas"] for model in status["models"]), default=0)
            if alive <= len(self.stages) or replicas < 2:
                return f"{node.name} sees {alive} nodes and every layer on at least {replicas}"
        ready = await self.http.get(f"{self.entry.http}/ready")
        return "" if ready.status_code == 200 else ready.text[:200]

    async def at_rest(self, within_s: float = 30.0) -> dict[str, dict[str, int]]:
        """Waits until no node runs or holds anything; what is left after `within_s`, by node: leaks."""
        leaks: dict[str, dict[str, int]] = {}
        with trio.move_on_after(within_s):
            while leaks := await self._held():  # noqa: ASYNC110
                await trio.sleep(0.1)
        return leaks

    async def _held(self) -> dict[str, dict[str, int]]:
        held: dict[str, dict[str, int]] = {}
        for node in (self.entry, *self.stages.values()):
            status = (await self.http.get(f"{node.http}/mesh/status")).json()
            load: dict[str, Any] = next(peer["load"] for peer in status["nodes"] if peer["id"] == status["self"]["id"])
            counts = {key: load[key] for key in ("running", "waiting", "kv_blocks_used", "prefill_tokens_queued") if load[key]}
            if counts:
                held[node.name] = counts
        return held
