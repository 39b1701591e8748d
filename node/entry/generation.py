"""A generation: the life of one choice of one request, as a state machine without I/O.

It decides which attempt counts, which token comes next, and when to plan a new path. Rules:

1. Events of an older attempt change nothing (fencing). Tokens and losses are compared with the attempt already in
   `RequestRun`, which also checks their sender against the path; `receive` here compares every event.
2. Tokens come in order of position, each once; a repeat is dropped, a gap loses the attempt.
3. Whatever is lost (a stage, its link, its member, its answer in time) leads to the same transition:
   close the old attempt, plan the next, replay prompt and tokens, go on. There is no other failover.
4. An attempt that falls silent has its nodes looked at (`DoubtPeers`); if membership then cannot reach one of them either, the
   attempt goes elsewhere and does not wait for the verdict. Once per token: a mesh that is merely slow must not chase itself.
5. A refusal for want of room costs nothing: the request takes its place in the entry's queue again, and is placed when a node
   has room (`routing.entry_queue`). It waits there as long as its deadline allows.
6. A path that exists is never reported as missing: a node that was lost is avoided where there is another, and otherwise
   tried again after a while.

A later journal commits each token to a peer before `EmitToken`; it slots in between `token` and `EmitToken`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from mesh.errors import DeadlineExceeded, MeshError, NoPath, Refused
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
    """Live nodes hold no path for it, whatever room they have; or it can never be served."""

    attempt: int
    error: MeshError


@dataclass(frozen=True, slots=True)
class Opened:
    attempt: int


@dataclass(frozen=True, slots=True)
class OpenRefused:
    """A stage refused to open the sequence; nothing is open any more on the others."""

    attempt: int
    node: NodeId
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
    """The client cancelled or disconnected."""


PeerNews = PeerGone | PeerSuspect | PeerBack
Event = PathPlanned | NoPathFound | Opened | OpenRefused | TokenDrawn | StageLost | PeerNews | StopFound | Cancelled


# --- what is to be done about it


@dataclass(frozen=True, slots=True)
class PlanPath:
    """Queue for a path; answer with `PathPlanned` once there is room, or with `NoPathFound`.

    `avoid`: nodes that were just lost, used where there is no path without them; `exclude`: those that can never hold it.
    """

    attempt: int
    avoid: frozenset[NodeId]
    exclude: frozenset[NodeId] = frozenset()


@dataclass(frozen=True, slots=True)
class OpenPath:
    """Open every stage for prompt and `tokens` (the answer so far); answer with Opened, OpenRefused or StageLost."""

    attempt: int
    path: Stages
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClosePath:
    """Free the attempt's sequences on all its stages, without waiting. `lost`: the node that was to blame, if any."""

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


class GenerationPhase(Enum):
    NEW = "new"
    QUEUED = "queued"  # a PlanPath effect is out: the request waits in the entry's queue for a path with room
    WAITING = "waiting"  # no path exists just now; tick plans again
    OPENING = "opening"  # an OpenPath effect is out
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """How long and how often to try."""

    replan_s: float = 20.0  # a path that breaks may come back: a peer restarts, a span is placed anew
    retry_s: float = 0.25  # between plans while waiting; membership events plan at once
    silence_s: float = 30.0  # no token for so long, and no other sign: the attempt is lost
    stall_s: float = 1.0  # no token for so long: its nodes are looked at, and one that is suspect is waited for no longer
    prefill_tok_s: float = 20.0  # the slowest prefill believed in, added to the first token's silence and stall
    avoid_s: float = 3.0  # a node that was lost gets no part of the next plans for so long, where there are others
    barren_attempts: int = 6  # attempts lost in a row without one new token: give up


@dataclass(slots=True)
class Generation:
    """One choice. Positions count from 0 over prompt and answer; the answer begins at `prompt_tokens`."""

    prompt_tokens: int
    deadline_at: float
    patience: RetryLimits = field(default_factory=RetryLimits)
    phase: GenerationPhase = GenerationPhase.NEW
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    path: Stages = ()
    history: list[str] = field(default_factory=list)  # why each attempt after the first was needed
    _avoid: dict[NodeId, float] = field(default_factory=dict)
    _excluded: set[NodeId] = field(default_factory=set)
    _barren: int = 0
    _wake_at: float = math.inf
    _stall_at: float = math.inf  # when the silence of a running attempt becomes suspicious; infinite once it has
    _suspects: set[NodeId] = field(default_factory=set)
    _give_up_at: float = math.inf
    _fault: MeshError | None = None  # why a node can never hold it

    @property
    def ended(self) -> bool:
        return self.phase in (GenerationPhase.DONE, GenerationPhase.FAILED, GenerationPhase.CANCELLED)

    @property
    def deadline(self) -> float:
        """When `tick` next has something to do; infinite once ended."""
        return math.inf if self.ended else min(self._wake_at, self._stall_at, self.deadline_at)

    def start(self, now: float) -> list[Effect]:
        return self._plan(now)

    def receive(self, event: Event, now: float) -> list[Effect]:
        """Every event passes here; one of another attempt is dropped."""
        attempt = getattr(event, "attempt", self.attempt)
        if self.ended or attempt != self.attempt:
            return []
        match event:
            case PathPlanned(path=path):
                return self._open(path, now) if self.phase is GenerationPhase.QUEUED else []
            case NoPathFound(error=error):
                return self._no_path(error, now) if self.phase is GenerationPhase.QUEUED else []
            case Opened():
                return self._opened(now)
            case OpenRefused():
                return self._refused(event.node, event.fault, now)
            case TokenDrawn():
                return self._token(event, now)
            case StageLost():
                return self._lost(event.node, event.reason, now, None if event.retryable else _fault(event), event.unreachable)
            case PeerGone(node=node, reason=reason):
                return self._peer_gone(node, reason, now)
            case PeerSuspect(node=node):
                return self._peer_suspect(node, now)
            case PeerBack(node=node):
                return self._peer_back(node, now)
            case StopFound():
                return self._end(GenerationPhase.DONE, Finish("stop"))
            case Cancelled():
                return self._end(GenerationPhase.CANCELLED)

    def tick(self, now: float) -> list[Effect]:
        if self.ended:
            return []
        if now >= self.deadline_at:
            return self._end(
                GenerationPhase.FAILED, Fail(DeadlineExceeded("the request's deadline passed before its answer was complete"))
            )
        if now >= self._wake_at:
            waits = self.phase is GenerationPhase.WAITING
            return self._plan(now) if waits else self._lost(None, f"no token for {self.patience.silence_s:g} s", now)
        return self._stalled(now) if now >= self._stall_at else []

    # --- transitions

    def _plan(self, now: float) -> list[Effect]:
        self.phase = GenerationPhase.QUEUED
        self.attempt += 1
        self._wake_at = self._stall_at = math.inf  # the queue answers, or the deadline passes
        self._avoid = {node: until for node, until in self._avoid.items() if until > now}
        return [PlanPath(self.attempt, frozenset(self._avoid), frozenset(self._excluded))]

    def _open(self, path: Stages, now: float) -> list[Effect]:
        self.phase, self.path = GenerationPhase.OPENING, path
        self._wake_at, self._stall_at = now + self.patience.silence_s, now + self.patience.stall_s
        return [OpenPath(self.attempt, path, tuple(self.tokens))]

    def _opened(self, now: float) -> list[Effect]:
        if self.phase is GenerationPhase.OPENING:
            self.phase = GenerationPhase.RUNNING
            replayed = self.prompt_tokens + len(self.tokens)
            first_token_at = now + replayed / self.patience.prefill_tok_s
            self._wake_at, self._stall_at = first_token_at + self.patience.silence_s, first_token_at + self.patience.stall_s
        return []

    def _token(self, drawn: TokenDrawn, now: float) -> list[Effect]:
        expected = self.prompt_tokens + len(self.tokens)
        if self.phase not in (GenerationPhase.RUNNING, GenerationPhase.OPENING) or drawn.position < expected:
            return []
        if drawn.position > expected:
            return self._lost(None, f"a gap: token {drawn.position} came where {expected} was due", now)
        self.phase = GenerationPhase.RUNNING
        self.tokens.append(drawn.token)
        self._wake_at, self._stall_at = now + self.patience.silence_s, now + self.patience.stall_s
        self._barren = 0
        self._give_up_at = math.inf
        emit = EmitToken(drawn.position, drawn.token, drawn.finish, drawn.logprob, drawn.top)
        return [emit] if drawn.finish is None else [emit, *self._end(GenerationPhase.DONE, Finish(drawn.finish))]

    def _refused(self, node: NodeId, fault: MeshError | None, now: float) -> list[Effect]:
        if self.phase is not GenerationPhase.OPENING:
            return []
        self.path, self._stall_at = (), math.inf
        if fault is not None:  # it can never fit there; a larger node may still take it
            self._excluded.add(node)
            self._fault = fault
        return self._plan(now)

    def _lost(
        self, node: NodeId | None, reason: str, now: float, fault: MeshError | None = None, unreachable: bool = False
    ) -> list[Effect]:
        if self.phase not in (GenerationPhase.OPENING, GenerationPhase.RUNNING):
            return []
        if fault is not None:
            return self._end(GenerationPhase.FAILED, Fail(fault))  # the request is to blame, no node
        if not unreachable:  # else its nodes are avoided until none is left, and patience decides
            self._barren += 1
        self.history.append(reason)
        close: list[Effect] = [ClosePath(self.attempt, self.path, node)]
        again = node in self._avoid  # it was taken for want of another
        if node is not None:
            self._avoid[node] = now + self.patience.avoid_s
        self.path = ()
        if self._barren >= self.patience.barren_attempts:
            error = Refused(f"{self._barren} attempts in a row were lost without a token; the last: {reason}", 1.0)
            return close + self._end(GenerationPhase.FAILED, Fail(error))
        if again and unreachable:
            return close + self._wait(Refused(f"the only nodes that hold its layers cannot be reached: {reason}", 1.0), now)
        return close + self._plan(now)

    def _stalled(self, now: float) -> list[Effect]:
        self._stall_at = math.inf
        nodes = frozenset(stage.node for stage in self.path)
        if suspects := nodes & self._suspects:
            return self._peer_suspect(min(suspects), now)
        return [DoubtPeers(nodes)]

    def _peer_suspect(self, node: NodeId, now: float) -> list[Effect]:
        self._suspects.add(node)
        stalled = self.phase in (GenerationPhase.OPENING, GenerationPhase.RUNNING) and self._stall_at == math.inf
        if stalled and not self._barren and any(stage.node == node for stage in self.path):
            # No node is blamed: with no path without it, the suspect is asked again (`routing.path` takes it last).
            return self._lost(None, f"{node}: suspect, and nothing came for {self.patience.stall_s:g} s", now)
        return []

    def _peer_back(self, node: NodeId, now: float) -> list[Effect]:
        self._suspects.discard(node)
        self._avoid.pop(node, None)
        return self._plan(now) if self.phase is GenerationPhase.WAITING else []

    def _peer_gone(self, node: NodeId, reason: str, now: float) -> list[Effect]:
        self._suspects.discard(node)
        self._avoid[node] = now + self.patience.avoid_s
        if any(stage.node == node for stage in self.path):
            return self._lost(node, f"{node}: {reason}", now, unreachable=True)
        return []

    def _no_path(self, error: MeshError, now: float) -> list[Effect]:
        """No live nodes hold a path: fail at once when nothing was ever begun, otherwise wait for one to come back."""
        if not isinstance(error, NoPath) or not self.history:
            return self._end(GenerationPhase.FAILED, Fail(self._fault or error))
        return self._wait(error, now)

    def _wait(self, error: MeshError, now: float) -> list[Effect]:
        """Plans again after a while; fails with `error` when no path has brought a token for `replan_s`."""
        self._give_up_at = min(self._give_up_at, now + self.patience.replan_s)
        if now >= self._give_up_at:
            return self._end(GenerationPhase.FAILED, Fail(error))
        self.phase, self.path = GenerationPhase.WAITING, ()
        self._wake_at = now + self.patience.retry_s
        return []

    def _end(self, phase: GenerationPhase, last: Effect | None = None) -> list[Effect]:
        effects: list[Effect] = [ClosePath(self.attempt, self.path)] if self.path else []
        self.phase = phase
        return effects if last is None else [*effects, last]


def _fault(event: StageLost) -> MeshError:
    return event.error or MeshError(event.reason)
