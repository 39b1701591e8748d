"""The peer call `membership.sync`: what two nodes tell one another when their fingerprints differ.

The caller sends a digest of all it knows; the answer holds what the caller lacks and names what it wants;
a second call brings that. Without a digest the call is a push: here is news. The structs ride in the frame's
tail; a reply that would grow too long ends early and says that there is `more`.
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
MAX_OWNER_BYTES = 1024 * 1024  # of what one node tells of itself, keys and values
MAX_OWNER_KEYS = 8192
MAX_KEY_CHARS = 512
DELTA_BYTES = 64  # reckoned for a delta without its entries
ENTRY_BYTES = 16  # reckoned for an entry's version and lengths
MAX_VERSION = 2**47  # half of what a counter holds, so that an owner can always go beyond what others say of it
MAX_ENTRIES = 16_384  # of any list in a sync; above the largest mesh that is configured


T = TypeVar("T")


class BadSync(ValueError):
    """The bytes are no sync of ours; the text says why."""


class DigestEntry(msgspec.Struct, frozen=True, array_like=True):
    """What the sender knows of one node, in 30 bytes."""

    node: Id
    epoch: Counter
    incarnation: Counter
    state: PeerState
    facts_epoch: Counter = 0
    facts_version: Counter = 0


class MemberRecord(msgspec.Struct, frozen=True, array_like=True):
    """What the sender knows of one node, in full. `age_s`: how long it has been in this state.

    `signature` is the node's own: under its goodbye when it has left, else under its words of this incarnation.
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
    where: Where | None = None  # its network coordinate, as the sender heard it
    key: PublicKey = b""
    signature: Signature = b""

    def __post_init__(self) -> None:
        check_description(self.name, self.host, self.region)

    @property
    def address(self) -> Address:
        return self.host, self.port

    @property
    def words(self) -> Alive | Left:
        """What the node itself said last, with its signature."""
        if self.state is PeerState.LEFT:
            return Left(self.node, self.epoch, self.incarnation, self.signature)
        place = self.name, self.host, self.port, self.region
        return Alive(self.node, self.epoch, self.incarnation, *place, self.signature, self.key)


class FactsEntry(msgspec.Struct, frozen=True, array_like=True):
    """One key as its owner wrote it last; None: it deleted it."""

    key: Annotated[str, Meta(max_length=MAX_KEY_CHARS)]
    version: Counter
    value: Annotated[bytes, Meta(max_length=MAX_OWNER_BYTES)] | None


Known = tuple[int, int]
"""(epoch, version) of a copy of an owner's map; (0, 0): nothing."""


class FactsDelta(msgspec.Struct, frozen=True, array_like=True):
    """What a copy of an owner's map at version `since` lacks up to version `upto`, in version order.

    `collected`: deletions up to here are forgotten. A copy below it, given a delta from 0, starts over.
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
    """About what an entry takes on the wire; not less."""
    return ENTRY_BYTES + len(entry.key.encode()) + len(entry.value or b"")


def is_sound(delta: FactsDelta) -> bool:
    """Whether an honest teller could have made it: writes in order, each key once, all within its range."""
    versions = [entry.version for entry in delta.entries]
    ordered = all(a < b for a, b in pairwise(versions))
    within = not versions or (delta.since < versions[0] and versions[-1] <= delta.upto)
    once = len({entry.key for entry in delta.entries}) == len(versions)
    return ordered and within and once and delta.since < delta.upto and delta.collected <= delta.upto


class FactsWanted(msgspec.Struct, frozen=True, array_like=True):
    """The sender lacks something of this node; of its map it holds this much."""

    node: Id
    facts_epoch: Counter = 0
    facts_version: Counter = 0


class Sync(msgspec.Struct, frozen=True, array_like=True):
    digest: Annotated[tuple[DigestEntry, ...], Meta(max_length=MAX_ENTRIES)] = ()
    members: Annotated[tuple[MemberRecord, ...], Meta(max_length=MAX_ENTRIES)] = ()
    deltas: Annotated[tuple[FactsDelta, ...], Meta(max_length=MAX_ENTRIES)] = ()


class Synced(msgspec.Struct, frozen=True, array_like=True):
    node: Id  # the node that answers: the caller may know only an address, or a host name
    members: Annotated[tuple[MemberRecord, ...], Meta(max_length=MAX_ENTRIES)] = ()
    deltas: Annotated[tuple[FactsDelta, ...], Meta(max_length=MAX_ENTRIES)] = ()
    wanted: Annotated[tuple[FactsWanted, ...], Meta(max_length=MAX_ENTRIES)] = ()
    more: bool = False  # it did not all fit: ask again


_encoder = msgspec.msgpack.Encoder()
_sync_decoder = msgspec.msgpack.Decoder(Sync)
_synced_decoder = msgspec.msgpack.Decoder(Synced)


def encode(struct: Sync | Synced) -> bytes:
    return _encoder.encode(struct)


def decode_sync(tail: bytes) -> Sync:
    """Raises BadSync: too long, of another shape, or out of bounds."""
    return _decode(_sync_decoder, tail, MAX_SYNC_BYTES)


def decode_synced(tail: bytes) -> Synced:
    """Raises BadSync: too long, of another shape, or out of bounds."""
    return _decode(_synced_decoder, tail, MAX_SYNC_BYTES)


def _decode(decoder: msgspec.msgpack.Decoder[T], raw: bytes, limit_bytes: int) -> T:
    if len(raw) > limit_bytes:
        raise BadSync(f"expected at most {limit_bytes} bytes, got {len(raw)}")
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadSync(f"not a membership sync: {error}") from None
