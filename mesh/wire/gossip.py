"""The messages and claims of membership, with their limits. `mesh.wire.datagram_codec` encodes them.

Four messages for probes (`Ping`, `Ack`, `PingReq`, `Nack`), two about connections (`ConnectCheck`, `ConnectChecked`), and
`Gossip`. Each carries the sender's epoch and incarnation, its load, an 8-byte fingerprint of its members and facts, and as many
claims about members as fit.
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
MAX_CLAIM_BYTES = 250  # with the longest name and host, key and signature; a usual claim without its key takes half
MAX_CLAIMS = 128  # the smallest claim takes 15 bytes, so no honest datagram holds more
MAX_NAME_BYTES = 32
MAX_HOST_BYTES = 46  # the longest text form of an IPv6 address, and most host names
MAX_REGION_BYTES = 16

MAX_COUNTER = 2**48  # of epochs and incarnations: far below the overflow of 64 bits
ZERO_LOAD = Load()
REFUSED, TIMEOUT = "refused", "timeout"  # causes of a death
LISTENS, STALLED = "listens", "stalled"  # causes of suspicions: the process exists; it has also been silent for long

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
    """The bytes are not a gossip message; the message has the reason. The receiver drops and counts the datagram."""


def check_description(name: str, host: str, region: str) -> None:
    """Refuses a name, host or region that does not fit a claim.

    Raises:
        ValueError: naming the part, its size and its limit in bytes of UTF-8.
    """
    limits = (("name", name, MAX_NAME_BYTES), ("host", host, MAX_HOST_BYTES), ("region", region, MAX_REGION_BYTES))
    for part, text, limit_bytes in limits:
        size_bytes = len(text.encode())
        if size_bytes > limit_bytes:
            raise ValueError(f"a node's {part} may take {limit_bytes} bytes, {text!r} takes {size_bytes}")


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """`node` is alive at this address: a claim signed by the node itself (`mesh.keys.signing`), also when peers forward it.

    The key is in the first claims of a run, when many peers lack it; later claims can omit it.
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
    """`by` probed `node` at this incarnation, directly and through others, and got no answer.

    `by` equal to `node` stands for no accuser or an unknown one; such a suspicion confirms nothing.
    """

    node: Id
    epoch: Counter
    incarnation: Counter
    by: Id
    listens: bool = False  # its host still accepts connections on its port: the process is stalled or cut off, not gone


class Dead(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """A suspicion of `node` ran out at `by`. `cause`: "timeout" (silence) or "refused" (its host refuses its port)."""

    node: Id
    epoch: Counter
    incarnation: Counter
    by: Id
    cause: Annotated[str, Meta(max_length=8)] = TIMEOUT


class Left(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """`node` has left on purpose, and signed this claim."""

    node: Id
    epoch: Counter
    incarnation: Counter
    signature: Signature = b""


Claim = Alive | Suspect | Dead | Left


class Sender(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The sender, with soft state that is newer than any record of it."""

    node: Id
    epoch: Counter
    incarnation: Counter
    fingerprint: Annotated[int, Meta(ge=0)]  # of all live (node, epoch, incarnation, facts version), 64 bits
    load: Load = ZERO_LOAD
    load_age_ms: Annotated[int, Meta(ge=0)] = 0  # sent as 65,535 if above
    lag_ms: Annotated[int, Meta(ge=0)] = 0  # the worst recent delay of the sender's own process, as measured there


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """A probe of `target`, answered by an `Ack` with the same `seq` unless another node now has that address."""

    sender: Sender
    seq: Sequence
    target: Id
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()
    where: Where | None = None  # in some pings; then in their acks too


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    """Answers a `Ping`; or, from the peer that was asked, a `PingReq` whose target answered."""

    sender: Sender
    seq: Sequence
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()
    where: Where | None = None


class PingReq(msgspec.Struct, frozen=True, array_like=True, tag="req"):
    """Asks a member to ping `target` and to forward its `Ack` with this `seq`."""

    sender: Sender
    seq: Sequence
    target: Id
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


class Nack(msgspec.Struct, frozen=True, array_like=True, tag="nack"):
    """Answers a `PingReq` whose target has not answered yet: the asker's own link works, so the silence is the target's."""

    sender: Sender
    seq: Sequence
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


class Gossip(msgspec.Struct, frozen=True, array_like=True, tag="say"):
    """Claims alone."""

    sender: Sender
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


class ConnectCheck(msgspec.Struct, frozen=True, array_like=True, tag="knock"):
    """Asks a member to connect to `target` and to answer with a `ConnectChecked` of this `seq`."""

    sender: Sender
    seq: Sequence
    target: Id
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


class ConnectChecked(msgspec.Struct, frozen=True, array_like=True, tag="knocked"):
    """`refused`: the host refused the connection. False also when the host did not answer."""

    sender: Sender
    seq: Sequence
    refused: bool
    claims: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()


GossipMessage = Ping | Ack | PingReq | Nack | Gossip | ConnectCheck | ConnectChecked


def load_is_sane(load: Load) -> bool:
    """Returns whether no figure is negative, infinite or not a number: such a figure would spoil every score computed from it."""
    counts = (load.running, load.waiting, load.kv_blocks_used, load.kv_blocks_total, load.prefill_tokens_queued)
    rates = (load.prefill_tok_s, load.step_ms)
    return all(0 <= count <= MAX_COUNTER for count in counts) and all(rate >= 0 and math.isfinite(rate) for rate in rates)
