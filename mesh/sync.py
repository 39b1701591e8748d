"""The peer call `membership.sync`: what two nodes tell one another when their fingerprints differ.

The caller sends a digest of all it knows; the answer holds what the caller lacks and names what it wants;
a second call brings that. Without a digest the call is a push: here is news. The structs ride in the frame's
tail; a reply that would grow too long ends early, and the next exchange goes on, for the fingerprints still differ.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from mesh.gossip import Alive, Counter, Host, Id, Left, Name, Port, PublicKey, Region, Signature, Where, check_description
from mesh.ids import Address
from mesh.view import Facts, PeerState

SYNC_KIND = "membership.sync"
MAX_SYNC_BYTES = 4 * 1024 * 1024
MAX_FACTS_BYTES = 256 * 1024  # one node's record, encoded
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
    cause: Annotated[str, Meta(max_length=8)] = ""  # of a death: as in `mesh.gossip.Dead`; of a suspicion: "listens"
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


class FactsRecord(msgspec.Struct, frozen=True, array_like=True):
    """One owner's `Facts` as it wrote them; `body` is their MessagePack, passed on unread."""

    owner: Id
    epoch: Counter
    version: Counter
    body: Annotated[bytes, Meta(max_length=MAX_FACTS_BYTES)]


class Sync(msgspec.Struct, frozen=True, array_like=True):
    digest: Annotated[tuple[DigestEntry, ...], Meta(max_length=MAX_ENTRIES)] = ()
    members: Annotated[tuple[MemberRecord, ...], Meta(max_length=MAX_ENTRIES)] = ()
    records: Annotated[tuple[FactsRecord, ...], Meta(max_length=MAX_ENTRIES)] = ()


class Synced(msgspec.Struct, frozen=True, array_like=True):
    node: Id  # who answers: the caller may know no more than an address, or a host name
    members: Annotated[tuple[MemberRecord, ...], Meta(max_length=MAX_ENTRIES)] = ()
    records: Annotated[tuple[FactsRecord, ...], Meta(max_length=MAX_ENTRIES)] = ()
    wanted: Annotated[tuple[Id, ...], Meta(max_length=MAX_ENTRIES)] = ()


_encoder = msgspec.msgpack.Encoder()
_sync_decoder = msgspec.msgpack.Decoder(Sync)
_synced_decoder = msgspec.msgpack.Decoder(Synced)
_facts_decoder = msgspec.msgpack.Decoder(Facts)


def encode(struct: Sync | Synced | Facts) -> bytes:
    return _encoder.encode(struct)


def decode_sync(tail: bytes) -> Sync:
    """Raises BadSync: too long, of another shape, or out of bounds."""
    return _decode(_sync_decoder, tail, MAX_SYNC_BYTES)


def decode_synced(tail: bytes) -> Synced:
    """Raises BadSync: too long, of another shape, or out of bounds."""
    return _decode(_synced_decoder, tail, MAX_SYNC_BYTES)


def decode_facts(body: bytes) -> Facts:
    """Raises BadSync: too long, of another shape, or nested without end."""
    return _decode(_facts_decoder, body, MAX_FACTS_BYTES)


def _decode(decoder: msgspec.msgpack.Decoder[T], raw: bytes, limit_bytes: int) -> T:
    if len(raw) > limit_bytes:
        raise BadSync(f"expected at most {limit_bytes} bytes, got {len(raw)}")
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadSync(f"not a membership sync: {error}") from None
