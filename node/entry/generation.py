"""A generation: the life of one choice of one request, as a state machine without I/O.

It decides which attempt counts, which token comes next, and when to plan a new path. Rules:

1. Events of an older attempt change nothing (fencing). Tokens and losses are compared with the attempt already in
   `RequestRun`, which also checks their sender against the path; `receive` here compares every event.
2. Tokens come in order of position, each once; a repeat is dropped, a gap loses the attempt.
3. Every loss (of a stage, its link, its member, or an answer in time) leads to the same transition:
   close the old attempt, plan the next, replay prompt and tokens, continue. There is no other failover.
4. When an attempt falls silent, membership is asked to probe its nodes (`DoubtPeers`). If membership suspects one of them, the
   attempt is lost without waiting for the verdict. At most once per token, so that a slow mesh does not replan for ever.
5. A refused open (`_refused`) costs no computed work: the request takes its place in the entry's queue again, and is placed when
   a node has room (`routing.entry_queue`). It waits there as long as its deadline allows.
6. A path that exists is never reported as missing: a lost node is avoided where there is another, and otherwise tried again
   after a while.

A later journal commits each token to a peer before `EmitToken`, between `TokenDrawn` and `EmitToken`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from mesh.errors import DeadlineExceeded, MeshError, NoPath, Refused
from mesh.ids import NodeId
from routing.path import PathStages

# --- events: what happens to a generation


@dataclass(frozen=True, slots=True)
class PathPlanned:
    attempt: int
    path: PathStages


@dataclass(frozen=True, slots=True)
class NoPathFound:
    """The live nodes hold no path, whatever room they have; or none of them can ever serve the request."""

    attempt: int
    error: MeshError


@dataclass(frozen=True, slots=True)
class Opened:
    attempt: int


@dataclass(frozen=True, slots=True)
class OpenRefused:
    """The stage on `node` refused to open the sequence; the attempt's other stages have been closed."""

    attempt: int
    node: NodeId
    fault: MeshError | None = None  # set where the request can never fit on the node


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
    """A stage gave the attempt up, or cannot be reached (`unreachable`). `node` None: the stage is not known."""

    attempt: int
    node: NodeId | None
    reason: str
    retryable: bool = True
    error: MeshError | None = None
    unreachable: bool = False
    no_room: bool = False  # the stage evicted the sequence: it is not avoided, and the attempt does not count as failed


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A node died, left, restarted or stalled, or a link to it broke."""

    node: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class PeerSuspect:
    """Membership cannot reach a node and has not declared it dead yet, or its engine makes no progress."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class PeerBack:
    """A suspect node is alive, or a node has joined or restarted."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class StopFound:
    """The entry found a stop string in the text, which ends the answer."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client cancelled or disconnected."""


PeerNews = PeerGone | PeerSuspect | PeerBack
GenerationEvent = PathPlanned | NoPathFound | Opened | OpenRefused | TokenDrawn | StageLost | PeerNews | StopFound | Cancelled


# --- effects: what the shell (`node.entry.entry.RequestRun`) has to do


@dataclass(frozen=True, slots=True)
class PlanPath:
    """Queue for a path; answer with `PathPlanned` once there is room on one, or with `NoPathFound`.

    `avoid`: nodes that were just lost, used where there is no path without them. `exclude`: nodes that can never hold it.
    """

    attempt: int
    avoid: frozenset[NodeId]
    exclude: frozenset[NodeId] = frozenset()


@dataclass(frozen=True, slots=True)
class OpenPath:
    """Open every stage for prompt and `tokens` (the answer so far); answer with Opened, OpenRefused or StageLost."""

    attempt: int
    path: PathStages
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClosePath:
    """Free the attempt's sequences on all its stages, without waiting. `lost`: the node that failed, if one did."""

    attempt: int
    path: PathStages
    lost: NodeId | None = None


@dataclass(frozen=True, slots=True)
class DoubtPeers:
    """Have membership probe these nodes now: a token from them is overdue."""

    nodes: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class EmitToken:
    """The next token of the answer, for the client; the last one if `finish` is set."""

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


GenerationEffect = PlanPath | OpenPath | ClosePath | DoubtPeers | EmitToken | Finish | Fail


class GenerationPhase(Enum):
    NEW = "new"
    QUEUED = "queued"  # `PlanPath` was returned and is not answered yet: it waits in the entry's queue for a path with room
    WAITING = "waiting"  # there is no path; `tick` plans again
    OPENING = "opening"  # `OpenPath` was returned and is not answered yet
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """How long and how often a generation tries."""

    replan_s: float = 20.0  # longest wait for a path where there is none: a peer may restart, a span may be placed anew
    retry_s: float = 0.25  # between plans while waiting; membership events plan at once
    silence_s: float = 30.0  # an attempt without a token for this long is lost
    stall_s: float = 1.0  # after this long without a token the attempt's nodes are probed, and a suspect one is given up
    prefill_tok_s: float = 20.0  # slowest prefill allowed for: extends `silence_s` and `stall_s` before the first token
    avoid_s: float = 3.0  # a lost node is avoided by plans for this long, where there are others
    tokenless_attempts: int = 6  # the request fails after this many attempts lost in a row without a new token


@dataclass(slots=True)
class Generation:
    """The state of one choice. Positions count from 0 over prompt and answer; the answer begins at `prompt_tokens`."""

    prompt_tokens: int
    deadline_at: float
    limits: RetryLimits = field(default_factory=RetryLimits)
    phase: GenerationPhase = GenerationPhase.NEW
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    path: PathStages = ()
    history: list[str] = field(default_factory=list)  # why each attempt after the first was needed
    _avoid: dict[NodeId, float] = field(default_factory=dict)  # lost nodes, and until when plans avoid them
    _avoided: frozenset[NodeId] = frozenset()  # by the latest plan, if it could
    _excluded: set[NodeId] = field(default_factory=set)  # nodes that can never hold it
    _tokenless_attempts: int = 0  # lost in a row since the latest token
    _wake_at: float = math.inf  # WAITING: time of the next plan; OPENING, RUNNING: the attempt is lost then
    _stall_at: float = math.inf  # when the attempt's nodes are to be probed; infinite once they have been
    _suspects: set[NodeId] = field(default_factory=set)
    _give_up_at: float = math.inf  # end of the present wait for a path
    _fault: MeshError | None = None  # why one of `_excluded` can never hold it

    @property
    def ended(self) -> bool:
        return self.phase in (GenerationPhase.DONE, GenerationPhase.FAILED, GenerationPhase.CANCELLED)

    @property
    def deadline(self) -> float:
        """The time at which `tick` is next due; infinite once ended."""
        return math.inf if self.ended else min(self._wake_at, self._stall_at, self.deadline_at)

    @property
    def avoided(self) -> frozenset[NodeId]:
        """Nodes that were lost a short while ago, and that plans avoid."""
        return frozenset(self._avoid)

    def start(self, now: float) -> list[GenerationEffect]:
        assert self.phase is GenerationPhase.NEW
        return self._plan(now)

    def receive(self, event: GenerationEvent, now: float) -> list[GenerationEffect]:
        """Applies an event. Every event passes here; events of another attempt, or after the end, change nothing."""
        attempt = getattr(event, "attempt", self.attempt)  # events about peers and the client concern every attempt
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
                if event.no_room:
                    return self._evicted(event.reason, now)
                fault = None if event.retryable else event.error or MeshError(event.reason)
                return self._lost(event.node, event.reason, now, fault, event.unreachable)
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

    def tick(self, now: float) -> list[GenerationEffect]:
        if self.ended:
            return []
        if now >= self.deadline_at:
            return self._end(
                GenerationPhase.FAILED, Fail(DeadlineExceeded("the request's deadline passed before its answer was complete"))
            )
        if now >= self._wake_at:
            if self.phase is GenerationPhase.WAITING:
                return self._plan(now)
            return self._lost(None, f"no token for {self.limits.silence_s:g} s", now)
        return self._stalled(now) if now >= self._stall_at else []

    # --- transitions

    def _plan(self, now: float) -> list[GenerationEffect]:
        self.phase = GenerationPhase.QUEUED
        self.attempt += 1
        self._wake_at = self._stall_at = math.inf  # the queue answers, or the deadline passes
        self._avoid = {node: until for node, until in self._avoid.items() if until > now}
        self._avoided = frozenset(self._avoid)
        return [PlanPath(self.attempt, self._avoided, frozenset(self._excluded))]

    def _open(self, path: PathStages, now: float) -> list[GenerationEffect]:
        self.phase, self.path = GenerationPhase.OPENING, path
        self._wake_at, self._stall_at = now + self.limits.silence_s, now + self.limits.stall_s
        return [OpenPath(self.attempt, path, tuple(self.tokens))]

    def _opened(self, now: float) -> list[GenerationEffect]:
        if self.phase is GenerationPhase.OPENING:  # else the first token came before the answer to the open
            self.phase = GenerationPhase.RUNNING
            replayed = self.prompt_tokens + len(self.tokens)
            first_token_at = now + replayed / self.limits.prefill_tok_s
            self._wake_at, self._stall_at = first_token_at + self.limits.silence_s, first_token_at + self.limits.stall_s
        return []

    def _token(self, drawn: TokenDrawn, now: float) -> list[GenerationEffect]:
        expected = self.prompt_tokens + len(self.tokens)
        if self.phase not in (GenerationPhase.RUNNING, GenerationPhase.OPENING) or drawn.position < expected:
            return []  # no path is open, or the token is a repeat
        if drawn.position > expected:  # a frame was lost with its link: only a replay brings the missing token again
            return self._lost(None, f"a gap: token {drawn.position} came where {expected} was due", now)
        assert self.path, "a token counts only while a path is open"
        self.phase = GenerationPhase.RUNNING
        self.tokens.append(drawn.token)
        self._wake_at, self._stall_at = now + self.limits.silence_s, now + self.limits.stall_s
        self._tokenless_attempts = 0
        self._give_up_at = math.inf
        emit = EmitToken(drawn.position, drawn.token, drawn.finish, drawn.logprob, drawn.top)
        return [emit] if drawn.finish is None else [emit, *self._end(GenerationPhase.DONE, Finish(drawn.finish))]

    def _refused(self, node: NodeId, fault: MeshError | None, now: float) -> list[GenerationEffect]:
        """A stage refused the open: queues for another path."""
        if self.phase is not GenerationPhase.OPENING:
            return []
        self.path, self._stall_at = (), math.inf  # no ClosePath: the shell has closed the other stages already
        if fault is not None:  # the request can never fit on this node; a larger one may still take it
            self._excluded.add(node)
            self._fault = fault
        return self._plan(now)

    def _lost(
        self, node: NodeId | None, reason: str, now: float, fault: MeshError | None = None, unreachable: bool = False
    ) -> list[GenerationEffect]:
        if self.phase not in (GenerationPhase.OPENING, GenerationPhase.RUNNING):
            return []
        assert self.path, "an attempt that is open has a path to close"
        if fault is not None:
            return self._end(GenerationPhase.FAILED, Fail(fault))  # the request is at fault, not a node
        if not unreachable:  # unreachable nodes are avoided until no path is left; then `replan_s` bounds the wait
            self._tokenless_attempts += 1
        self.history.append(reason)
        close: list[GenerationEffect] = [ClosePath(self.attempt, self.path, node)]
        again = node in self._avoided  # it was used for lack of another
        if node is not None:
            self._avoid[node] = now + self.limits.avoid_s
        self.path = ()
        if self._tokenless_attempts >= self.limits.tokenless_attempts:
            error = Refused(f"{self._tokenless_attempts} attempts in a row were lost without a token; the last: {reason}", 1.0)
            return close + self._end(GenerationPhase.FAILED, Fail(error))
        if again:
            return close + self._wait(Refused(f"the only nodes that hold its layers fail: {reason}", 1.0), now)
        return close + self._plan(now)

    def _evicted(self, reason: str, now: float) -> list[GenerationEffect]:
        """A stage had no room for what the sequence has grown to: queues with the tokens so far, ahead of new requests."""
        if self.phase not in (GenerationPhase.OPENING, GenerationPhase.RUNNING):
            return []
        close = ClosePath(self.attempt, self.path)
        self.history.append(reason)
        self.path = ()
        return [close, *self._plan(now)]

    def _stalled(self, now: float) -> list[GenerationEffect]:
        """A token is overdue: gives the attempt up if one of its nodes is suspect, else has them probed."""
        self._stall_at = math.inf
        nodes = frozenset(stage.node for stage in self.path)
        if suspects := nodes & self._suspects:
            return self._peer_suspect(min(suspects), now)
        return [DoubtPeers(nodes)]

    def _peer_suspect(self, node: NodeId, now: float) -> list[GenerationEffect]:
        self._suspects.add(node)
        stalled = self.phase in (GenerationPhase.OPENING, GenerationPhase.RUNNING) and self._stall_at == math.inf
        # Only for the first attempt since the latest token: a mesh that is slow everywhere must not replan for ever.
        if stalled and not self._tokenless_attempts and any(stage.node == node for stage in self.path):
            # The node is not avoided: where no path exists without it, the suspect is used again (`routing.path` ranks it last).
            return self._lost(None, f"{node}: suspect, and nothing came for {self.limits.stall_s:g} s", now)
        return []

    def _peer_back(self, node: NodeId, now: float) -> list[GenerationEffect]:
        self._suspects.discard(node)
        self._avoid.pop(node, None)
        return self._plan(now) if self.phase is GenerationPhase.WAITING else []

    def _peer_gone(self, node: NodeId, reason: str, now: float) -> list[GenerationEffect]:
        self._suspects.discard(node)
        self._avoid[node] = now + self.limits.avoid_s
        if any(stage.node == node for stage in self.path):
            return self._lost(node, f"{node}: {reason}", now, unreachable=True)
        return []

    def _no_path(self, error: MeshError, now: float) -> list[GenerationEffect]:
        """There is no path: fails at once where no attempt was ever open, and waits for the path to come back otherwise."""
        if not isinstance(error, NoPath) or not self.history:
            return self._end(GenerationPhase.FAILED, Fail(self._fault or error))
        return self._wait(error, now)

    def _wait(self, error: MeshError, now: float) -> list[GenerationEffect]:
        """Plans again after a while; fails with `error` when no attempt has brought a token for `replan_s`."""
        self._give_up_at = min(self._give_up_at, now + self.limits.replan_s)
        if now >= self._give_up_at:
            return self._end(GenerationPhase.FAILED, Fail(error))
        self.phase, self.path = GenerationPhase.WAITING, ()
        self._wake_at = now + self.limits.retry_s
        return []

    def _end(self, phase: GenerationPhase, last: GenerationEffect | None = None) -> list[GenerationEffect]:
        effects: list[GenerationEffect] = [ClosePath(self.attempt, self.path)] if self.path else []
        self.phase = phase
        assert self.ended
        return effects if last is None else [*effects, last]
