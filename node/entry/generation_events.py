"""What happens to a generation, and what it wants done about it: the words between `node.entry.generation` and its shell."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import MeshError
from mesh.ids import Address, NodeId


@dataclass(frozen=True, slots=True)
class StageAt:
    """One stage of a path: `node` at `address` computes layers `[start, end)`."""

    node: NodeId
    address: Address
    start: int
    end: int


Stages = tuple[StageAt, ...]


# --- what happens to a generation


@dataclass(frozen=True, slots=True)
class PathPlanned:
    attempt: int
    path: Stages


@dataclass(frozen=True, slots=True)
class NoPathFound:
    """Routing found no path, or no peer that would take it."""

    attempt: int
    error: MeshError


@dataclass(frozen=True, slots=True)
class Opened:
    attempt: int


@dataclass(frozen=True, slots=True)
class OpenRefused:
    """A stage said BUSY; nothing is open any more on the others."""

    attempt: int
    node: NodeId
    retry_after_s: float
    fault: MeshError | None = None  # the request can never fit there


@dataclass(frozen=True, slots=True)
class TokenDrawn:
    attempt: int
    position: int
    token: int
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StageLost:
    """A stage gave the attempt up, or cannot be reached (`unreachable`). `node` None: it is not known which."""

    attempt: int
    node: NodeId | None
    reason: str
    retryable: bool = True
    error: MeshError | None = None
    unreachable: bool = False


@dataclass(frozen=True, slots=True)
class PeerGone:
    """Membership or a broken link says that a node is lost, whatever it did."""

    node: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class PeerSuspect:
    """Membership cannot reach a node, and gives it some seconds yet."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class PeerBack:
    """A node lives after all, or runs anew."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class StopFound:
    """The entry found a stop string in the text: the answer ends here."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody wants the rest."""


PeerNews = PeerGone | PeerSuspect | PeerBack
Event = PathPlanned | NoPathFound | Opened | OpenRefused | TokenDrawn | StageLost | PeerNews | StopFound | Cancelled


# --- what is to be done about it


@dataclass(frozen=True, slots=True)
class PlanPath:
    """Find a path for `attempt` that avoids `exclude`; answer with Planned or Unplannable."""

    attempt: int
    exclude: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class OpenPath:
    """Open every stage for prompt and `tokens` (the answer so far); answer with Opened, OpenRefused or StageLost."""

    attempt: int
    path: Stages
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClosePath:
    """Free the attempt's sequences on all its stages; nobody waits for it. `lost`: the node that was to blame, if any."""

    attempt: int
    path: Stages
    lost: NodeId | None = None


@dataclass(frozen=True, slots=True)
class DoubtPeers:
    """Have membership look at these nodes now: they were expected to bring a token."""

    nodes: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class EmitToken:
    """The next token of the answer, for the client; with `finish` it is the last."""

    position: int
    token: int
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    error: MeshError


Effect = PlanPath | OpenPath | ClosePath | DoubtPeers | EmitToken | Finish | Fail
