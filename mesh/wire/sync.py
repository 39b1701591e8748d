"""The peer call `membership.sync`: two nodes exchange their differences when their fingerprints differ.

The caller sends a digest of its members and facts. The answer holds the records that the caller lacks, and names those that the
answering node lacks; the caller sends these in a second call. A call without a digest only pushes records. The structs are in
the frame's tail; a reply that would grow too long ends early and sets `more`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from mesh.ids import Address
from mesh.view import PeerState
from mesh.wire.gossip import Alive, Counter, Host, Id, Left, Name, Port, PublicKey, Region, Signature, Where, check_description

SYNC_KIND = "membership.sync"
MAX_SYNC_BYTES = 4 * 1024 * 1024
MAX_OWNER_BYTES = 1024 * 1024  # of one node's facts, keys and values
MAX_OWNER_KEYS = 8192
MAX_KEY_CHARS = 512
DELTA_BYTES = 64  # estimate for a delta without its entries
ENTRY_BYTES = 16  # estimate for an entry's version and lengths
MAX_VERSION = 2**47  # half of a counter's range, so that an owner can always exceed a version that peers report
MAX_ENTRIES = 16_384  # of any list in a sync; above the largest mesh that is configured


T = TypeVar("T")


class BadSync(ValueError):
    """The bytes are not a membership sync; the message has the reason."""


class DigestEntry(msgspec.Struct, frozen=True, array_like=True):
    """The sender's newest versions of one node's records, in 30 bytes."""

    node: Id
    epoch: Counter
    incarnation: Counter
    state: PeerState
    facts_epoch: Counter = 0
    facts_version: Counter = 0


class MemberRecord(msgspec.Struct, frozen=True, array_like=True):
    """The sender's full record of one node. `age_s`: how long the node has been in this state.

    `signature` is the node's own: of its `Left` claim when it has left, else of its `Alive` claim of this incarnation.
    """

    node: Id
    epoch: Counter
    incarnation: Counter
    state: PeerState
    name: Name
    host: Host
    port: Port
    region: Region = ""
    age_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    cause: Annotated[str, Meta(max_length=8)] = ""  # of a death: as in `mesh.wire.gossip.Dead`; of a suspicion: "listens"
    where: Where | None = None  # its network coordinate, as the sender received it
    key: PublicKey = b""
    signature: Signature = b""

    def __post_init__(self) -> None:
        check_description(self.name, self.host, self.region)

    @property
    def address(self) -> Address:
        return self.host, self.port

    @property
    def own_claim(self) -> Alive | Left:
        """Returns the node's own last claim, with its signature."""
        if self.state is PeerState.LEFT:
            return Left(self.node, self.epoch, self.incarnation, self.signature)
        place = self.name, self.host, self.port, self.region
        return Alive(self.node, self.epoch, self.incarnation, *place, self.signature, self.key)


class FactsEntry(msgspec.Struct, frozen=True, array_like=True):
    """One key with the owner's newest value; None: the owner deleted the key."""

    key: Annotated[str, Meta(max_length=MAX_KEY_CHARS)]
    version: Counter
    value: Annotated[bytes, Meta(max_length=MAX_OWNER_BYTES)] | None


Known = tuple[int, int]
"""(epoch, version) of a copy of an owner's map; (0, 0): there is no copy."""


class FactsDelta(msgspec.Struct, frozen=True, array_like=True):
    """The changes of an owner's map from version `since` to version `upto`, in version order.

    `collected`: deletions up to this version are no longer listed. A copy below it needs a delta from 0 and is replaced.
    """

    owner: Id
    epoch: Counter
    since: Counter
    upto: Annotated[int, Meta(ge=0, le=MAX_VERSION)]
    collected: Counter
    entries: Annotated[tuple[FactsEntry, ...], Meta(max_length=MAX_ENTRIES)]

    @property
    def size_bytes(self) -> int:
        return DELTA_BYTES + sum(map(entry_bytes, self.entries))


def entry_bytes(entry: FactsEntry) -> int:
    """Returns an upper estimate of an entry's size on the wire."""
    return ENTRY_BYTES + len(entry.key.encode()) + len(entry.value or b"")


def is_sound(delta: FactsDelta) -> bool:
    """Returns whether the delta is consistent: writes in order, each key once, all within its range."""
    versions = [entry.version for entry in delta.entries]
    ordered = all(a < b for a, b in pairwise(versions))
    within = not versions or (delta.since < versions[0] and versions[-1] <= delta.upto)
    once = len({entry.key for entry in delta.entries}) == len(versions)
    return ordered and within and once and delta.since < delta.upto and delta.collected <= delta.upto


class FactsWanted(msgspec.Struct, frozen=True, array_like=True):
    """Asks for records of this node; the versions are those of the copy that the sender has."""

    node: Id
    facts_epoch: Counter = 0
    facts_version: Counter = 0


class Sync(msgspec.Struct, frozen=True, array_like=True):
    digest: Annotated[tuple[DigestEntry, ...], Meta(max_length=MAX_ENTRIES)] = ()
    members: Annotated[tuple[MemberRecord, ...], Meta(max_length=MAX_ENTRIES)] = ()
    deltas: Annotated[tuple[FactsDelta, ...], Meta(max_length=MAX_ENTRIES)] = ()


class Synced(msgspec.Struct, frozen=True, array_like=True):
    node: Id  # the node that answers: the caller may have only an address or a host name
    members: Annotated[tuple[MemberRecord, ...], Meta(max_length=MAX_ENTRIES)] = ()
    deltas: Annotated[tuple[FactsDelta, ...], Meta(max_length=MAX_ENTRIES)] = ()
    wanted: Annotated[tuple[FactsWanted, ...], Meta(max_length=MAX_ENTRIES)] = ()
    more: bool = False  # the reply is incomplete: call again


_encoder = msgspec.msgpack.Encoder()
_sync_decoder = msgspec.msgpack.Decoder(Sync)
_synced_decoder = msgspec.msgpack.Decoder(Synced)


def encode(struct: Sync | Synced) -> bytes:
    return _encoder.encode(struct)


def decode_sync(tail: bytes) -> Sync:
    """Decodes a call. Raises BadSync: too long, of another shape, or out of bounds."""
    return _decode(_sync_decoder, tail, MAX_SYNC_BYTES)


def decode_synced(tail: bytes) -> Synced:
    """Decodes a reply. Raises BadSync: too long, of another shape, or out of bounds."""
    return _decode(_synced_decoder, tail, MAX_SYNC_BYTES)


def _decode(decoder: msgspec.msgpack.Decoder[T], raw: bytes, limit_bytes: int) -> T:
    if len(raw) > limit_bytes:
        raise BadSync(f"expected at most {limit_bytes} bytes, got {len(raw)}")
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadSync(f"not a membership sync: {error}") from None
