"""The datagrams of membership: what one fits in and what it may say. How it lies on the wire: `mesh.wire.datagram_codec`.

Four messages for probes (`Ping`, `Ack`, `PingReq`, `Nack`), two about connections (`ConnectCheck`, `ConnectChecked`), and
`Gossip`. Each carries the sender's own standing, its load and one 8-byte fingerprint of all it knows, and as many claims about
members as still fit.
Source: SWIM (Das, Gupta, Motivala, DSN 2002), section 4, with Lifeguard's accuser in each suspicion.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from mesh.ids import Address, NodeId
from mesh.view import Load

MAX_DATAGRAM_BYTES = 1400  # sealed; fits an Ethernet frame under IPv6, UDP and one tunnel header
MAX_SEAL_BYTES = 64  # what a seal may add
MAX_MESSAGE_BYTES = MAX_DATAGRAM_BYTES - MAX_SEAL_BYTES
MAX_CLAIM_BYTES = 250  # of the longest name and host, with key and signature; a usual one without its key takes half
MAX_CLAIMS = 128  # the smallest claim takes 15 bytes, so no honest datagram holds more
MAX_NAME_BYTES = 32
MAX_HOST_BYTES = 46  # the longest text form of an IPv6 address, and most host names
MAX_REGION_BYTES = 16

MAX_COUNTER = 2**48  # of epochs and incarnations: far from what 64 bits would overflow on one more step
ZERO_LOAD = Load()
REFUSED, TIMEOUT = "refused", "timeout"  # causes of a death
LISTENS, STALLED = "listens", "stalled"  # of suspicions: its process exists; and it has been silent for long

Id = Annotated[NodeId, Meta(pattern=r"^[0-9a-f]{16}\Z")]
Counter = Annotated[int, Meta(ge=0, le=MAX_COUNTER)]
Sequence = Annotated[int, Meta(ge=0, lt=2**32)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[str, Meta(max_length=MAX_NAME_BYTES)]
Host = Annotated[str, Meta(max_length=MAX_HOST_BYTES)]
Region = Annotated[str, Meta(max_length=MAX_REGION_BYTES)]
PublicKey = Annotated[bytes, Meta(max_length=32)]
Signature = Annotated[bytes, Meta(max_length=64)]
Where = Annotated[bytes, Meta(max_length=32)]  # a node's network coordinate, packed by `membership.core.coordinates`


class BadDatagram(ValueError):
    """The bytes are no message of ours; the text says why. Drop and count."""


def check_description(name: str, host: str, region: str) -> None:
    """Refuses what would not fit a claim: it could never spread.

    Raises:
        ValueError: naming the part, its size and its limit in bytes of UTF-8.
    """
    limits = (("name", name, MAX_NAME_BYTES), ("host", host, MAX_HOST_BYTES), ("region", region, MAX_REGION_BYTES))
    for part, text, limit_bytes in limits:
        size_bytes = len(text.encode())
        if size_bytes > limit_bytes:
            raise ValueError(f"a node's {part} may take {limit_bytes} bytes, {text!r} takes {size_bytes}")


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """`node` is alive and reached here: a claim signed by the node itself (`mesh.keys.signing`), also when others pass it on.

    The key travels with the first words of a run, when many do not have it yet; later ones can do without.
    """

    node: Id
    epoch: Counter
    incarnation: Counter
    name: Name
    host: Host
    port: Port
    region: Region = ""
    signature: Signature = b""
    key: PublicKey = b""

    def __post_init__(self) -> None:
        check_description(self.name, self.host, self.region)

    @property
    def address(self) -> Address:
        return self.host, self.port


class Suspect(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """`by` probed `node` at this incarnation, itself and through others, and heard nothing.

    `by` equal to `node` stands for no accuser, or one whose name got lost; it confirms nothing.
    """

    node: Id
    epoch: Counter
    incarnation: Counter
    by: Id
    listens: bool = False  # its host still takes connections for it: it is stalled or cut off, not gone


class Dead(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """A suspicion of `node` ran out at `by`. `cause`: "timeout" (silence) or "refused" (its host refuses its port)."""

    node: Id
    epoch: Counter
    incarnation: Counter
    by: Id
    cause: Annotated[str, Meta(max_length=8)] = TIMEOUT


class Left(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """`node` said goodbye itself, and signed it."""

    node: Id
    epoch: Counter
    incarnation: Counter
    signature: Signature = b""


Claim = Alive | Suspect | Dead | Left


class Sender(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The sender, and soft state of its own that is newer than any record."""

    node: Id
    epoch: Counter
    incarnation: Counter
    fingerprint: Annotated[int, Meta(ge=0)]  # of all live (node, epoch, incarnation, facts version), 64 bits
    load: Load = ZERO_LOAD
    load_age_ms: Annotated[int, Meta(ge=0)] = 0  # told as 65,535 if above
    lag_ms: Annotated[int, Meta(ge=0)] = 0  # how late the sender is with all it does, as it measured


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """A probe of `target`. Answered by an `Ack` with the same `seq`, unless another node now has that address."""

    sender: Sender
    seq: Sequence
    target: Id
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()
    where: Where | None = None  # now and then; then the ack says it too


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    """Answers a `Ping`, or, from the peer that was asked, a `PingReq` whose target answered."""

    sender: Sender
    seq: Sequence
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()
    where: Where | None = None


class PingReq(msgspec.Struct, frozen=True, array_like=True, tag="req"):
    """Ping `target`, a member you know, for me, and pass its `Ack` on under my `seq`."""

    sender: Sender
    seq: Sequence
    target: Id
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


class Nack(msgspec.Struct, frozen=True, array_like=True, tag="nack"):
    """Answers a `PingReq` whose target has not answered yet: the asker is heard, so the silence is not its own fault."""

    sender: Sender
    seq: Sequence
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


class Gossip(msgspec.Struct, frozen=True, array_like=True, tag="say"):
    """Claims alone."""

    sender: Sender
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


class ConnectCheck(msgspec.Struct, frozen=True, array_like=True, tag="knock"):
    """Asks a member to connect to `target`; it answers in a `ConnectChecked` with this `seq` whether the host refused."""

    sender: Sender
    seq: Sequence
    target: Id
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


class ConnectChecked(msgspec.Struct, frozen=True, array_like=True, tag="knocked"):
    """`refused`: the host itself refused the connection. False also when no answer came at all."""

    sender: Sender
    seq: Sequence
    refused: bool
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


GossipMessage = Ping | Ack | PingReq | Nack | Gossip | ConnectCheck | ConnectChecked


def load_is_sane(load: Load) -> bool:
    """No figure is negative, infinite or not a number: one such would poison every score computed from it."""
    counts = (load.running, load.waiting, load.kv_blocks_used, load.kv_blocks_total, load.prefill_tokens_queued)
    rates = (load.prefill_tok_s, load.step_ms)
    return all(0 <= count <= MAX_COUNTER for count in counts) and all(rate >= 0 and math.isfinite(rate) for rate in rates)
