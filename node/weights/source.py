"""Hands the files of this node's models to peers: pieces of what is here, at a pace that leaves room for serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import trio

from mesh.errors import BadRequest, Refused, RemoteError
from mesh.ids import NodeId
from mesh.manifest import MANIFEST_KIND, NOT_HELD, PIECE_BYTES, PIECE_KIND
from mesh.wire.calls import CallReply, Header
from node.weights.catalogue import Catalogue
from node.weights.pace import RateLimit

SERVING_BYTES_S = 64 << 20  # while sequences run here: half a Gbit/s, and one core in twenty to read it
IDLE_BYTES_S = 2 << 30
READS_AT_ONCE = 2  # threads; a disk gives little more to more
MAX_WAITING = 64  # asks: what four peers have under way; beyond it a peer is asked to come again


@dataclass(slots=True)
class SourceStatistics:
    """Since the start."""

    pieces_sent_total: int = 0
    bytes_sent_total: int = 0
    refused_total: int = 0
    not_held_total: int = 0


class WeightsSource:
    """`rate_bytes_s`: a bound set by the operator; None: by whether sequences run here."""

    def __init__(self, serving: Callable[[], bool], rate_bytes_s: float | None = None) -> None:
        self._serving = serving
        self._rate_bytes_s = rate_bytes_s
        self._catalogues: dict[str, Catalogue] = {}
        self._pace = RateLimit()
        self._reading = trio.CapacityLimiter(READS_AT_ONCE)
        self._waiting = 0
        self._counters = SourceStatistics()
        self.handlers = {MANIFEST_KIND: self._on_manifest, PIECE_KIND: self._on_piece}

    def statistics(self) -> SourceStatistics:
        return replace(self._counters)

    def add(self, catalogue: Catalogue) -> None:
        self._catalogues[catalogue.id] = catalogue

    def remove(self, manifest: str) -> None:
        self._catalogues.pop(manifest, None)

    async def _on_manifest(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        encoded, offset = self._find(header).encoded, header.get("offset")
        if type(offset) is not int or not 0 <= offset < len(encoded):
            raise RemoteError(sender, f"asked for byte {offset!r:.40} of a manifest of {len(encoded)}")
        part = encoded[offset : offset + PIECE_BYTES]
        await trio.sleep(self._wait_s(len(part)))
        return {"size_bytes": len(encoded)}, part

    async def _on_piece(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        catalogue, name, number = self._find(header), header.get("name"), header.get("number")
        if not isinstance(name, str) or type(number) is not int:
            raise RemoteError(sender, "asked for a piece without name or number")
        if self._waiting >= MAX_WAITING:
            self._counters.refused_total += 1
            raise Refused("many peers fetch weights from here", retry_after_s=1.0)
        if name not in catalogue.places or not catalogue.size_bytes(name, number):
            raise self._not_held(name)
        self._waiting += 1
        try:
            await trio.sleep(self._wait_s(catalogue.size_bytes(name, number)))
            content = await trio.to_thread.run_sync(catalogue.read, name, number, limiter=self._reading)
        except OSError as error:
            raise BadRequest(f"{name[:80]} cannot be read: {error.strerror or error}", code=NOT_HELD, status=404) from None
        finally:
            self._waiting -= 1
        if content is None:
            raise self._not_held(name)
        self._counters.pieces_sent_total += 1
        self._counters.bytes_sent_total += len(content)
        return {}, content

    def _find(self, header: Header) -> Catalogue:
        wanted = header.get("manifest")
        found = self._catalogues.get(wanted) if isinstance(wanted, str) else None
        if found is None:
            raise self._not_held(f"a model of manifest {wanted!r:.24}")
        return found

    def _not_held(self, what: str) -> BadRequest:
        self._counters.not_held_total += 1
        return BadRequest(f"{what[:80]} is not here", code=NOT_HELD, status=404)

    def _wait_s(self, size_bytes: int) -> float:
        rate = self._rate_bytes_s or (SERVING_BYTES_S if self._serving() else IDLE_BYTES_S)
        return self._pace.wait_s(size_bytes, rate, trio.current_time())
