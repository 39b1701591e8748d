"""The trace format: the inputs of one node's membership core, in order, for a replay.

A bounded ring of inputs in memory, each with the signatures made for it and a hash of what the core answered; a dump of it
is a file for `mesh simulate --replay`. The ring is made of segments: when it is full its oldest segment goes, and each segment
begins with a checkpoint of what was known. From the node's first input on a replay is exact, from a checkpoint it is close.
No key is in it, and nothing of any request: membership holds neither. Names, addresses, loads and facts are.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta

from mesh.view import Facts, Load
from mesh.wire.gossip import Alive, GossipMessage, Host, Id, Port
from mesh.wire.sync import MAX_SYNC_BYTES, Sync, Synced
from mesh.wire.twin import ProcessRun, TwinAnswer

MAGIC = b"mesh membership trace 1\n"
SEGMENTS = 4
MAX_RECORD_BYTES = 2 * MAX_SYNC_BYTES

At = tuple[Host, Port]
Seed = Annotated[int, Meta(ge=0, le=2**62)]
Signatures = tuple[bytes, ...]


class BadTrace(ValueError):
    """The file is no trace, or has another version; the text names the reason."""


class _Input(msgspec.Struct, frozen=True, array_like=True):
    now: float


class StartInput(_Input, frozen=True, array_like=True, tag="start"):
    """The node at its start, and the seed of its random numbers."""

    me: Alive
    public_key: bytes
    config: dict[str, float]
    seed: Seed


class CheckpointInput(_Input, frozen=True, array_like=True, tag="check"):
    """The start of a segment: the state of the node, in case earlier segments were dropped. `seed`: of its random numbers."""

    me: Alive
    seed: Seed
    known: Synced
    linked: tuple[Id, ...]
    seeds: tuple[At, ...]


class DatagramInput(_Input, frozen=True, array_like=True, tag="heard"):
    source: At
    message: GossipMessage
    arrived_at: float | None


class TickInput(_Input, frozen=True, array_like=True, tag="tick"): ...


class LoadInput(_Input, frozen=True, array_like=True, tag="load"):
    load: Load


class LoadNotedInput(_Input, frozen=True, array_like=True, tag="noted"):
    node: Id
    load: Load


class LinkUpInput(_Input, frozen=True, array_like=True, tag="linked"):
    node: Id


class LinkLostInput(_Input, frozen=True, array_like=True, tag="lost"):
    node: Id
    proven: bool


class StreamAnsweredInput(_Input, frozen=True, array_like=True, tag="stream"):
    seq: int
    by: Id


class ConnectTriedInput(_Input, frozen=True, array_like=True, tag="tried"):
    number: int
    refused: bool | None


class FactsPublishedInput(_Input, frozen=True, array_like=True, tag="facts"):
    facts: Facts


class SyncAskedInput(_Input, frozen=True, array_like=True, tag="asked"):
    asker: Id
    sync: Sync


class SyncAnsweredInput(_Input, frozen=True, array_like=True, tag="answered"):
    source: At
    synced: Synced


class SeedKnownInput(_Input, frozen=True, array_like=True, tag="seed"):
    address: At


class TwinAskedInput(_Input, frozen=True, array_like=True, tag="twin asked"):
    by: ProcessRun


class TwinFoundInput(_Input, frozen=True, array_like=True, tag="twin found"):
    place: At
    answer: TwinAnswer | None


class LeaveInput(_Input, frozen=True, array_like=True, tag="leave"): ...


Input = (
    StartInput
    | CheckpointInput
    | DatagramInput
    | TickInput
    | LoadInput
    | LoadNotedInput
    | LinkUpInput
    | LinkLostInput
    | StreamAnsweredInput
    | ConnectTriedInput
    | FactsPublishedInput
    | SyncAskedInput
    | SyncAnsweredInput
    | SeedKnownInput
    | TwinAskedInput
    | TwinFoundInput
    | LeaveInput
)


class TraceRecord(msgspec.Struct, frozen=True, array_like=True):
    """One input, the signatures made while it was processed, and the hash of the answer."""

    input: Input
    signatures: Signatures
    answer: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(TraceRecord)


# A trace holds hashes of printed answers. Types that were renamed since are hashed under the name of the first release, so that
# traces of older nodes can be replayed.
_HASHED_NAMES = {
    "SendDatagram": "Send",
    "StartSync": "Exchange",
    "PushFacts": "Push",
    "WatchLinks": "Watch",
    "LoadMeasured": "Measured",
    "LossBatch": "Cut",
    "ViewFrozen": "Froze",
    "EpochRenewed": "Renewed",
    "ProcessDisplaced": "Displaced",
    "ConnectCheck": "Knock",
    "ConnectChecked": "Knocked",
    "FactsWanted": "Want",
    "ProcessRun": "Run",
    "TwinAnswer": "Answer",
}
_RENAMED = re.compile(rf"\b({'|'.join(_HASHED_NAMES)})\(")


def answer_hash(answer: object) -> bytes:
    """Returns an eight-byte hash of the core's answer: effects and other frozen values print the same on every run."""
    printed = _RENAMED.sub(lambda found: f"{_HASHED_NAMES[found[1]]}(", repr(answer))
    return hashlib.blake2b(printed.encode(), digest_size=8).digest()


@dataclass(slots=True)
class TraceSegment:
    records: list[bytes] = field(default_factory=list)
    size_bytes: int = 0


class Trace:
    """Keeps the latest `limit_bytes` of records, by segment."""

    def __init__(self, limit_bytes: int) -> None:
        self._segment_bytes = max(1, limit_bytes // SEGMENTS)
        self._segments: deque[TraceSegment] = deque([TraceSegment()])
        self.dropped_records = 0

    @property
    def full(self) -> bool:
        """The current segment is full; the next record must be a checkpoint, which begins another one."""
        return self._segments[-1].size_bytes >= self._segment_bytes

    def begin_segment(self) -> None:
        self._segments.append(TraceSegment())
        while len(self._segments) > SEGMENTS:
            self.dropped_records += len(self._segments.popleft().records)

    def add(self, record: TraceRecord) -> None:
        raw = _encoder.encode(record)
        segment = self._segments[-1]
        segment.records.append(raw)
        segment.size_bytes += len(raw) + 4

    def dump(self) -> bytes:
        """Returns the file: a line with format and version, then each record after its length in four bytes."""
        records = (raw for segment in self._segments for raw in segment.records)
        return MAGIC + b"".join(part for raw in records for part in (len(raw).to_bytes(4, "big"), raw))


def read(raw: bytes) -> list[TraceRecord]:
    """The records of a dump.

    Raises:
        BadTrace: another file, cut off, or records of another shape.
    """
    if not raw.startswith(MAGIC):
        raise BadTrace(f"expected a membership trace, which begins with {MAGIC.decode().strip()!r}")
    records = [_decoded(part) for part in _parts(memoryview(raw)[len(MAGIC) :])]
    if not records or not isinstance(records[0].input, StartInput | CheckpointInput):
        raise BadTrace("expected a trace that begins with a start or a checkpoint")
    return records


def _parts(rest: memoryview) -> Iterable[memoryview]:
    while rest:
        length = int.from_bytes(rest[:4], "big")
        if len(rest) < 4 + length or length > MAX_RECORD_BYTES:
            raise BadTrace("the trace is cut off, or damaged")
        yield rest[4 : 4 + length]
        rest = rest[4 + length :]


def _decoded(raw: memoryview) -> TraceRecord:
    try:
        return _decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadTrace(f"a record of another version, or damaged: {error}") from None
