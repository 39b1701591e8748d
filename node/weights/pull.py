"""Decides which piece to ask of which peer next: the core of fetching weights.

Every source has a few asks under way, so a fast one is asked more often and a slow one does not hold the others up. What
goes wrong at one source costs a retry at another: one that does not answer in time, is lost or is busy rests for a while,
longer each time; one whose bytes do not match their hash is never asked again; one that lacks a thing is not asked for
it again. Nothing is given up: while no source can be asked, the pull waits for sources to come or to have rested.

A piece counts when the shell has checked and written it (`PieceKept`). Every ask has a number, and what comes late under an old
number changes nothing but, if it was right, that the piece is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mesh.ids import NodeId
from mesh.manifest import WeightPiece

ASKS_PER_SOURCE = 4  # one being read, one on the wire, one being hashed, one spare
ASKS_IN_ALL = 16  # pieces that may be in memory at once
ASK_TIMEOUT_S = 20.0  # a source that gives less than 50 kB/s is not worth waiting for
FIRST_REST_S = 0.5
MAX_REST_S = 30.0
LACKS_FOR_S = 5.0  # a source without a piece may be fetching it
LOOKED_AT = 64  # waiting pieces at a time, where the sources at hand lack the first ones: a pull may have 100,000


# What happens.
@dataclass(frozen=True, slots=True)
class SourcesChanged:
    """The peers that tell of this manifest now."""

    nodes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class PieceKept:
    """The answer to ask `number` matched its hash and is on the disk."""

    number: int


@dataclass(frozen=True, slots=True)
class HashMismatch:
    """The answer to ask `number` had other bytes than the manifest has."""

    number: int


@dataclass(frozen=True, slots=True)
class NotHeld:
    """The source of ask `number` does not have it."""

    number: int


@dataclass(frozen=True, slots=True)
class AskFailed:
    """Ask `number` came to nothing. `rest_s`: for how long its source asked for a pause; None: the default pause."""

    number: int
    rest_s: float | None = None


PullEvent = SourcesChanged | PieceKept | HashMismatch | NotHeld | AskFailed


# What to do.
@dataclass(frozen=True, slots=True)
class AskPiece:
    """Ask `node` for `piece`, check what comes, write it, and tell of it under `number`."""

    number: int
    node: NodeId
    piece: WeightPiece


@dataclass(frozen=True, slots=True)
class PullDone:
    """All pieces are kept."""


PullEffect = AskPiece | PullDone


@dataclass(slots=True)
class _Source:
    asked: int = 0  # asks under way
    resting_until: float = 0.0
    rest_s: float = FIRST_REST_S  # the next one's length
    lies: bool = False
    lacks: dict[str, float] = field(default_factory=dict)  # name -> until when it is not asked for it


@dataclass(frozen=True, slots=True)
class _Asked:
    node: NodeId
    piece: WeightPiece
    until: float


@dataclass(frozen=True, slots=True)
class PullStatistics:
    pieces: int = 0
    pieces_kept: int = 0
    bytes_kept: int = 0
    bytes_all: int = 0
    retries_total: int = 0
    lies_total: int = 0


class Pull:
    """`pieces` are fetched in their order, by and large."""

    def __init__(self, pieces: Iterable[WeightPiece]) -> None:
        self._waiting = deque(dict.fromkeys(pieces))
        self._sources: dict[NodeId, _Source] = {}
        self._told: tuple[NodeId, ...] = ()
        self._asked: dict[int, _Asked] = {}
        self._late: dict[int, _Asked] = {}  # asks that were given up; their answers, right or wrong, may still come
        self._missing = set(self._waiting)
        self._last_number = 0
        self._ended = False
        sizes = sum(piece.size_bytes for piece in self._missing)
        self._counted = PullStatistics(pieces=len(self._missing), bytes_all=sizes)

    def statistics(self) -> PullStatistics:
        return self._counted

    @property
    def done(self) -> bool:
        return not self._missing

    @property
    def starved(self) -> bool:
        """Pieces are missing, and no source is being asked."""
        return bool(self._missing) and not self._asked

    @property
    def deadline(self) -> float:
        """When `tick` must be called, at the latest."""
        times = [asked.until for asked in self._asked.values()]
        if self._waiting:
            usable = self._usable().values()
            times += [source.resting_until for source in usable if source.resting_until]
            times += [until for source in usable for until in source.lacks.values()]
        return min(times, default=float("inf"))

    def receive(self, event: PullEvent, now: float) -> list[PullEffect]:
        match event:
            case SourcesChanged(nodes):
                self._told = nodes
                for node in nodes:
                    self._sources.setdefault(node, _Source())
            case PieceKept(number):
                self._kept(number)
            case HashMismatch(number):
                self._end(number, now, lied=True)
            case NotHeld(number):
                asked = self._asked.get(number)
                if asked is not None:
                    self._sources[asked.node].lacks[asked.piece.name] = now + LACKS_FOR_S
                self._end(number, now, rest_s=0.0)
            case AskFailed(number, rest_s):
                self._end(number, now, rest_s=rest_s)
        return self._ask(now)

    def tick(self, now: float) -> list[PullEffect]:
        for number in [number for number, asked in self._asked.items() if asked.until <= now]:
            late = self._asked[number]
            self._end(number, now)
            self._late[number] = late
        for source in self._sources.values():
            if source.resting_until <= now:
                source.resting_until = 0.0
            source.lacks = {name: until for name, until in source.lacks.items() if until > now}
        return self._ask(now)

    def _kept(self, number: int) -> None:
        asked = self._asked.pop(number, None)
        if asked is not None:
            source = self._sources[asked.node]
            source.asked -= 1
            source.rest_s = FIRST_REST_S
        came = asked or self._late.pop(number, None)
        if came is not None and came.piece in self._missing:
            self._missing.discard(came.piece)
            self._counted = replace(
                self._counted,
                pieces_kept=self._counted.pieces_kept + 1,
                bytes_kept=self._counted.bytes_kept + came.piece.size_bytes,
            )

    def _end(self, number: int, now: float, *, rest_s: float | None = None, lied: bool = False) -> None:
        """The ask came to nothing: its piece waits again, its source rests."""
        asked, late = self._asked.pop(number, None), self._late.pop(number, None)
        if late is not None and lied:
            self._sources[late.node].lies = True
        if asked is None:
            return
        source = self._sources[asked.node]
        source.asked -= 1
        source.lies |= lied
        if rest_s is None and source.resting_until > now:
            rest_s = 0.0  # it rests already: all that was under way at a lost link is one failure
        elif rest_s is None:
            rest_s = source.rest_s
            source.rest_s = min(2 * source.rest_s, MAX_REST_S)
        if rest_s > 0:
            source.resting_until = max(source.resting_until, now + min(rest_s, MAX_REST_S))
        self._waiting.appendleft(asked.piece)
        self._counted = replace(
            self._counted, retries_total=self._counted.retries_total + 1, lies_total=self._counted.lies_total + lied
        )

    def _usable(self) -> dict[NodeId, _Source]:
        """Sources that tell of the model and never lied; some may rest."""
        return {node: self._sources[node] for node in self._told if not self._sources[node].lies}

    def _ask(self, now: float) -> list[PullEffect]:
        if not self._missing:
            if self._ended:
                return []
            self._ended = True
            return [PullDone()]
        effects: list[PullEffect] = []
        usable = {node: source for node, source in self._usable().items() if source.resting_until <= now}
        passed_over: list[WeightPiece] = []
        while self._waiting and len(self._asked) < ASKS_IN_ALL and any(each.asked < ASKS_PER_SOURCE for each in usable.values()):
            if len(passed_over) >= LOOKED_AT and self._asked:
                break  # the next answer looks on, at those behind
            piece = self._waiting.popleft()
            if piece not in self._missing:
                continue  # its late answer came after all
            node = _least_asked(usable, piece.name)
            if node is None:
                passed_over.append(piece)
                continue
            self._last_number += 1
            usable[node].asked += 1
            self._asked[self._last_number] = _Asked(node, piece, now + ASK_TIMEOUT_S)
            effects.append(AskPiece(self._last_number, node, piece))
        self._waiting.extend(passed_over)
        return effects


def _least_asked(usable: dict[NodeId, _Source], name: str) -> NodeId | None:
    """The source that may have it with the fewest asks under way; of equals the first announced."""
    free = [node for node, source in usable.items() if source.asked < ASKS_PER_SOURCE and name not in source.lacks]
    return min(free, key=lambda node: usable[node].asked, default=None)
