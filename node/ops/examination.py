"""What `mesh doctor` asks of a node: looks at itself and at its peers, for as long as one is ready to wait for an answer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import trio

from mesh.ids import ModelId, NodeId
from mesh.links.refusals import Refusal
from mesh.view import Peer, View
from mesh.wire.calls import CALL_FAILURES, Call, CallReply, Handlers, Header
from node.ops.doctor import PROBLEM, Observations, diagnosis
from node.ops.keys import MeshKeys
from node.reports import DoctorReport
from rag.types import StoreInfo

KIND = "mesh.look"
LOOK_S = 2.0
READY_S = 12.0  # a canary may take ten
MAX_PEERS = 64  # asked for their clocks


class Examination:
    def __init__(
        self,
        view: Callable[[], View],
        call: Call,
        clock: Callable[[], float],
        directory: Path,
        *,
        refusals: Callable[[], Sequence[Refusal]],
        stores: Callable[[], Sequence[StoreInfo]],
        missing_layers: Callable[[], Mapping[ModelId, tuple[tuple[int, int], ...]]],
        ready: Callable[[], Awaitable[str | None]],
        keys: MeshKeys | None,
        changed_files: Mapping[ModelId, str] = MappingProxyType({}),
    ) -> None:
        """`changed_files`: of each model whose files here proved to be others than were hashed, how."""
        self._view, self._call, self._clock, self._directory = view, call, clock, directory
        self._refusals, self._stores, self._missing_layers, self._ready = refusals, stores, missing_layers, ready
        self._keys, self._changed_files = keys, changed_files
        self.handlers: Handlers = {KIND: self._answer}

    async def examine(self) -> DoctorReport:
        """Examines this node and the mesh, within `READY_S`."""
        view, keys = self._view(), self._keys
        not_ready: str | None = f"no token came through a path within {READY_S:g} s"
        skews: dict[NodeId, float | None] = {}
        async with trio.open_nursery() as nursery:
            for peer in [peer for peer in view.live() if peer.id != view.me][:MAX_PEERS]:
                nursery.start_soon(self._ask_for_the_time, peer, skews)
            with trio.move_on_after(READY_S):
                not_ready = await self._ready()
        free_bytes, not_written = await trio.to_thread.run_sync(_disk, self._directory)
        found = diagnosis(
            Observations(
                self._view(),
                self._refusals(),
                {node: skew for node, skew in skews.items() if self._view().is_live(node)},
                self._missing_layers(),
                not_ready,
                self._stores(),
                keyless=keys is None,
                key_saved=keys is None or keys.saved,
                keys_on_ring=len(keys.ring.keys) if keys else 1,
                free_bytes=free_bytes,
                not_written=not_written,
                changed_files=dict(self._changed_files),
            )
        )
        healthy = not any(finding.severity == PROBLEM for finding in found)
        return DoctorReport(node=view.me, name=view.peers[view.me].name, healthy=healthy, findings=found)

    async def _ask_for_the_time(self, peer: Peer, skews: dict[NodeId, float | None]) -> None:
        asked_at = self._clock()
        try:
            header, _ = await self._call(peer.address, KIND, {}, timeout_s=LOOK_S)
        except CALL_FAILURES:
            skews[peer.id] = None
            return
        peer_time = header.get("time")
        skews[peer.id] = peer_time - (asked_at + self._clock()) / 2 if isinstance(peer_time, int | float) else None

    async def _answer(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        return {"time": self._clock()}, b""


def _disk(directory: Path) -> tuple[int | None, str]:
    """Bytes free there, and why nothing can be written, if so (*blocking*)."""
    probe = directory / f"probe.{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        return shutil.disk_usage(directory).free, ""
    except OSError as error:
        return None, error.strerror or type(error).__name__
