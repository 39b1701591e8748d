"""Effects: requests and notices of the membership core to its shell. Frozen, so that a test compares them with `==`."""

from __future__ import annotations

import msgspec

from mesh.ids import Address, NodeId
from mesh.view import Load, PeerState
from mesh.wire.gossip import GossipMessage
from mesh.wire.sync import Sync
from mesh.wire.twin import ProcessRun


class SendDatagram(msgspec.Struct, frozen=True, gc=False):
    """One datagram; may be lost."""

    to: Address
    message: GossipMessage


class StartSync(msgspec.Struct, frozen=True):
    """Compare all records with the node at `to`: a `membership.sync` call with a digest."""

    to: Address


class PushFacts(msgspec.Struct, frozen=True):
    """Push facts that are too large for a datagram: a `membership.sync` call without a digest."""

    to: Address
    sync: Sync


class TryConnect(msgspec.Struct, frozen=True):
    """Try to connect to `to`, and report the outcome with `tried(number, refused)`; None: no answer."""

    number: int
    to: Address


class PingStream(msgspec.Struct, frozen=True):
    """Ping over a link, where datagrams got no answer: an empty `membership.sync` call. An answer goes to `stream_answered`."""

    seq: int
    to: Address


class WatchLinks(msgspec.Struct, frozen=True):
    """Keep links open to exactly these, so that the end of one of them is noticed at once. Others may stay open."""

    addresses: tuple[Address, ...]


class FindTwin(msgspec.Struct, frozen=True):
    """A claim of this identity that this process never made came from `to`: ask which process runs there, call `twin_found`."""

    to: Address


class MemberChanged(msgspec.Struct, frozen=True):
    """The state, precedence, name, address or region of a member changed. `before` is None for a newcomer.

    `stalled`: silent for as long as a death takes, but its process still listens.
    `restarted`: it returned with a higher epoch, so what ran there is lost even if it was never declared dead.
    """

    node: NodeId
    before: PeerState | None
    after: PeerState
    restarted: bool = False
    stalled: bool = False


class MemberForgotten(msgspec.Struct, frozen=True):
    """A tombstone was dropped: nothing is stored about the node any more."""

    node: NodeId


class FactsChanged(msgspec.Struct, frozen=True):
    """The facts of `node` changed."""

    node: NodeId


class LoadMeasured(msgspec.Struct, frozen=True, gc=False):
    """A datagram came directly from `node`: its load as of `load_at`, and the round trip if this datagram measured it."""

    node: NodeId
    load: Load
    load_at: float
    rtt_s: float | None


class LossBatch(msgspec.Struct, frozen=True):
    """The members lost within one short while, sorted: what ran on any of these is lost, or was moved away by those that left."""

    lost: tuple[NodeId, ...]
    left: tuple[NodeId, ...] = ()


class ViewFrozen(msgspec.Struct, frozen=True):
    """Much of the last stable view is missing: nothing is to be moved; or, not `frozen`, it may be again."""

    frozen: bool


class EpochRenewed(msgspec.Struct, frozen=True):
    """A member holds a claim of a later run of this node; this process is now run `epoch`, which must be stored on disk."""

    epoch: int


class TwinSeen(msgspec.Struct, frozen=True):
    """Another live process has this node's identity; it proved that it holds the key."""

    run: ProcessRun


class ProcessDisplaced(msgspec.Struct, frozen=True):
    """This process must stop and sends nothing more: an older process has its identity."""

    by: ProcessRun


Request = SendDatagram | StartSync | PushFacts | PingStream | TryConnect | WatchLinks | FindTwin
Notice = (
    MemberChanged
    | MemberForgotten
    | FactsChanged
    | LoadMeasured
    | LossBatch
    | ViewFrozen
    | EpochRenewed
    | TwinSeen
    | ProcessDisplaced
)
MembershipEffect = Request | Notice
