"""The view: an immutable snapshot of the peers and their facts.

Membership publishes a new `View` on every change; routing, placement, generations and index replication read its
attributes without a lock, an await or a copy. Times are on the local monotonic clock of the node that holds the view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated

import msgspec
from msgspec import Meta

from mesh.ids import Address, ModelId, NodeId

MAX_LAYERS = 4096  # of a model that a peer announces: lists of that length are allocated for it

MAX_ETA_S = 1_000_000  # eleven days; facts with a longer estimate are refused

Layer = Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
Hash = Annotated[str, Meta(max_length=128)]


class PeerState(StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"  # keeps what runs there; gets new work only where no other peer can do it
    DEAD = "dead"
    LEFT = "left"


class Readiness(StrEnum):
    """Whether a live node should get work, as it announces itself: a node may answer every ping and still compute nothing."""

    WARM = "warm"
    LOADING = "loading"  # serves nothing yet
    OVERLOADED = "overloaded"  # its KV blocks are full and requests wait; gets new work only where all peers are overloaded
    STALLED = "stalled"  # its engine makes no progress; gets new work only where no other peer can do it
    DRAINING = "draining"  # about to leave


class Span(msgspec.Struct, frozen=True, order=True):
    """Contiguous decoder layers `[start, end)` of one model, held and served by one node."""

    model: ModelId
    start: Layer
    end: Layer


class Loading(msgspec.Struct, frozen=True):
    """How far a node is with loading layers that it `Facts.intends` to serve, in whole numbers."""

    percent: Annotated[int, Meta(ge=0, le=100)]
    eta_s: Annotated[int, Meta(ge=0, le=MAX_ETA_S)]  # estimated time until the layers serve


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How busy a node is: soft state, newest wins, on every gossip message and peer answer.

    Counts cover all sequences of the node, of any entry; all are 0 at rest.
    """

    running: int = 0  # sequences that hold KV blocks
    waiting: int = 0  # requests admitted but not yet computed
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefill_tokens_queued: int = 0
    prefill_tok_s: float = 0.0  # measured average; 0: not yet known
    step_ms: float = 0.0  # measured average of one decode step over the node's own layers; 0: not yet known


APPROXIMATE = "approximate-"


def is_exact(numerics: str) -> bool:
    """Whether equal `ModelCard.numerics` promise equal tokens: not where they are empty or begin with `APPROXIMATE`."""
    return bool(numerics) and not numerics.startswith(APPROXIMATE)


class ModelCard(msgspec.Struct, frozen=True):
    """What a node publishes about a model. Cards with one id and other `weights` are of two versions (`mesh.versions`)."""

    id: ModelId
    layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    max_model_len: Annotated[int, Meta(ge=1)]
    weights: Hash  # identity: the hash of its manifest (`mesh.manifest`); empty: its files are still being hashed
    numerics: str  # fingerprint: equal fingerprints promise equal tokens (`is_exact`)
    kind: str = "chat"
    manifest: Hash = ""  # equals `weights` where this node sends the files to peers; empty: it does not
    written_at_s: Annotated[int, Meta(ge=0)] = 0  # when the newest of its weight files was written, in seconds since 1970
    whole_only: Annotated[str, Meta(max_length=300)] = ""  # why one node must hold all layers; empty: they may be on several


class Facts(msgspec.Struct, frozen=True):
    """What a node publishes about itself that does not fit a datagram; only the node itself changes its facts.

    `documents` belongs to `rag` and is opaque to all other packages: plain MessagePack values.
    """

    http: str = ""  # URL of the node's HTTP endpoint
    spans: tuple[Span, ...] = ()  # listed once they serve
    models: tuple[ModelCard, ...] = ()
    draining: bool = False
    version: str = ""
    pid: Annotated[int, Meta(ge=0)] = 0
    documents: dict[str, object] = {}
    intends: tuple[Span, ...] = ()  # being loaded, not yet served; keeps nodes that join together from all choosing one span
    loading: dict[ModelId, Loading] = {}  # progress of the models of `intends`
    capacity: dict[
        ModelId, Layer
    ] = {}  # decoder layers of a model that the node could hold; absent: its span is pinned and never moves
    readiness: Readiness = Readiness.WARM
    uncompiled: Annotated[str, Meta(max_length=512)] = ""  # why layers are served without the compiled kernel; empty: none are
    twin: Annotated[str, Meta(max_length=256)] = ""  # "NAME at HOST:PORT" of another live process with this node's identity


@dataclass(frozen=True, slots=True)
class Peer:
    """One node as this node sees it; a node is in its own view too."""

    id: NodeId
    name: str
    address: Address
    region: str = ""
    state: PeerState = PeerState.ALIVE
    epoch: int = 0  # counts restarts of the process on the same data directory
    incarnation: int = 0
    facts: Facts = field(default_factory=Facts)
    load: Load = field(default_factory=Load)
    load_at: float = 0.0  # when the load record was received, local monotonic seconds
    rtt_s: float | None = None  # last measured round trip; None: never measured
    rtt_estimate_s: float | None = None  # from network coordinates, or from its region; None: neither is known
    # Of a death: "refused" (its host refuses its port) or "timeout" (silence). Of a suspicion: "stalled"
    # (silent for long enough to be declared dead, but its host still accepts connections on its port), else empty.
    cause: str = ""

    @property
    def usable(self) -> bool:
        """Whether the peer may be given new work."""
        return self.state is PeerState.ALIVE and not self.facts.draining and not self.stalled

    @property
    def stalled(self) -> bool:
        """Whether the peer announces that its engine makes no progress."""
        return self.facts.readiness is Readiness.STALLED

    @property
    def overloaded(self) -> bool:
        """Whether the peer announces that requests already wait there for KV blocks."""
        return self.facts.readiness is Readiness.OVERLOADED


@dataclass(frozen=True, slots=True)
class View:
    """All known peers at one moment. `version` grows with every change of membership or facts, not of load."""

    me: NodeId
    peers: Mapping[NodeId, Peer] = field(default_factory=lambda: MappingProxyType({}))
    version: int = 0
    frozen: bool = False  # many members of the last stable view fell silent at once: nothing may be moved on this evidence

    def live(self) -> Iterator[Peer]:
        """Returns the peers that are alive or suspect, this node included."""
        return (peer for peer in self.peers.values() if peer.state in (PeerState.ALIVE, PeerState.SUSPECT))

    def is_live(self, node: NodeId) -> bool:
        peer = self.peers.get(node)
        return peer is not None and peer.state in (PeerState.ALIVE, PeerState.SUSPECT)
