"""Where peers were last seen, kept in the data directory: so that a mesh whose nodes all restarted finds itself again.

The dead are kept too, for they may be back tomorrow at their old address; only members that left are forgotten, and those
that were not seen for three days. Losing this file costs nothing but `--join`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from mesh.files import replace_file
from mesh.ids import Address, NodeId
from mesh.view import PeerState, View

FILE = "peers.json"
FORGET_S = 72 * 3600.0
SEEN_STEP_S = 3600.0  # a peer's time is brought up to date so often: what only ages is not worth a write
MAX_PEERS = 1024
_MAX_FILE_BYTES = 1 << 20

log = structlog.get_logger()


class _Seen(msgspec.Struct, array_like=True):
    host: str
    port: int
    at: float  # wall clock, seconds


class KnownPeers:
    def __init__(self, directory: Path, clock: Callable[[], float]) -> None:
        """A missing or damaged file is an empty one."""
        self._path = directory / FILE
        self._clock = clock
        self._peers = self._read()

    def addresses(self) -> list[Address]:
        """The latest seen first."""
        known = sorted(self._peers.values(), key=lambda seen: -seen.at)
        return list(dict.fromkeys((seen.host, seen.port) for seen in known))

    def note(self, view: View) -> bool:
        """Stores the current members, and writes what changed; True when something did."""
        now, before = self._clock(), dict(self._peers)
        self._peers = _not_ahead(self._peers, now)
        for peer in view.peers.values():
            if peer.id == view.me:
                continue
            seen = self._peers.get(peer.id)
            if peer.state is PeerState.LEFT:
                self._peers.pop(peer.id, None)
            elif peer.state in (PeerState.ALIVE, PeerState.SUSPECT) and (
                seen is None or (seen.host, seen.port) != peer.address or now - seen.at > SEEN_STEP_S
            ):
                self._peers[peer.id] = _Seen(*peer.address, now)
        kept = sorted(self._peers.items(), key=lambda item: -item[1].at)[:MAX_PEERS]
        self._peers = {node: seen for node, seen in kept if now - seen.at <= FORGET_S}
        if self._peers == before:
            return False
        self._write()
        return True

    def _read(self) -> dict[NodeId, _Seen]:
        try:
            with self._path.open("rb") as file:
                known = msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=dict[NodeId, _Seen])
        except FileNotFoundError:
            return {}
        except (msgspec.MsgspecError, OSError) as error:
            log.warning("peers.unreadable", path=self._path.name, error=str(error))
            return {}
        now = self._clock()
        known = _not_ahead(known, now)
        return {node: seen for node, seen in known.items() if now - seen.at <= FORGET_S and 0 < seen.port <= 65535}

    def _write(self) -> None:
        """Replaces the file atomically; a write error is logged."""
        try:
            replace_file(self._path, msgspec.json.encode(self._peers))
        except OSError as error:
            log.warning("peers.unwritten", path=self._path.name, error=str(error))


def _not_ahead(peers: dict[NodeId, _Seen], now: float) -> dict[NodeId, _Seen]:
    """Corrects times in the future: they were written by a clock that ran ahead, and would be kept for years."""
    return {node: seen if seen.at <= now else _Seen(seen.host, seen.port, now) for node, seen in peers.items()}
