"""The shell between peers and the engine: opens sequences for entries, and sends the outputs of engine steps to peers.

Activations go straight to the next stage; a token goes to the entry and back to the first stage, which decodes on without waiting
for the entry. The outputs of one step for one peer share a frame. Which path, which token and when to try again is decided at the
entry (`node.entry.generation`), not here. An open that the engine refuses (`_on_open`: too many sequences, too few KV blocks)
raises `Refused` to the entry. Entries then send what waits with them (`stage.demand`), and get the places that become free
(`stage.room`), the longest wait first: `routing.room_grants`.

A link authenticates the node at its other end, and frames about a sequence are accepted only from the node whose part they are:
activations from the previous stage, tokens from the last stage, opens and closes from the entry. All others are unauthorized,
although their sender holds the mesh key: they are counted and dropped.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import msgspec
import structlog
import trio
from msgspec import Meta
from msgspec.structs import replace as changed

from mesh.errors import BadRequest, MeshError, PeerLost, Refused, RemoteError
from mesh.ids import Address, ModelId, NodeId, StreamId, format_address
from mesh.links.refusals import BAD_ACTIVATIONS, UNAUTHORIZED_FRAME, WINDOW_S, Refusals
from mesh.prefix import NAME_BYTES
from mesh.wire.calls import Call, Header, Post, Reply
from node.engine.api import Engine, EngineOutput, HiddenOut, OpenSequence, SequenceKey, SequenceLost, SpanLost, TokenOut
from routing.room_grants import MAX_HEADS, RoomGrants, WaitingRequest

IDLE_S = 120.0  # a sequence idle for this long is freed, as its close was lost with a link; longer than any wait for a step
MAX_COMPILATIONS = 2  # grammars compiled in parallel; each takes a thread for up to a second, beside the engine's own
TAKEN_RETRY_S = 1.0  # after this long, the request that another entry runs under the same id may have ended
MAX_CLOSED_KEPT = 8192  # closed sequences that an open is compared with, in case its close came first; seconds of requests

log = structlog.get_logger()

# Rows of one-way frames as peers send them: msgspec checks types and ranges before anything reads them.
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
EncodedKey = tuple[StreamId, Count, Count]  # a `SequenceKey`: stream, choice, attempt
EncodedPageNames = tuple[Annotated[bytes, Meta(min_length=NAME_BYTES, max_length=NAME_BYTES)], ...]
PositiveCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
DraftTokens = tuple[Count, ...]
# Key, then the fields of `HiddenOut`, with the data's size in place of the data.
HiddenRow = tuple[StreamId, Count, Count, Count, PositiveCount, Count, EncodedPageNames, DraftTokens, Count]
TopLogprobs = tuple[tuple[Count, float], ...]
TokenRow = tuple[StreamId, Count, Count, Count, Count, Literal["stop", "length"] | None, float | None, TopLogprobs, Count]


class StageOpened(msgspec.Struct, frozen=True):
    """The answer to `stage.open`."""

    pages: Count = 0  # of the sequence's prefix, cached at the stage


class LostStage(msgspec.Struct, frozen=True):
    """The frame `stage.lost`: the sender gives the attempt up. `address`: of the stage that failed; None: not known."""

    key: EncodedKey
    reason: str
    retryable: bool
    address: Address | None
    no_room: bool = False


class RoomDemand(msgspec.Struct, frozen=True):
    """The frame `stage.demand`: the first requests that wait for room here, as (continued, priority, seconds waited)."""

    model: ModelId
    address: Address
    heads: Annotated[tuple[tuple[bool, int, Annotated[float, Meta(ge=0.0)]], ...], Meta(max_length=MAX_HEADS)]
    received: Count  # grants that the entry has received from here


class OpenStage(msgspec.Struct, frozen=True):
    """The call `stage.open`: asks a node to compute `sequence` for `entry`, with the sources and targets of its frames."""

    sequence: OpenSequence
    entry: NodeId
    previous: NodeId | None  # the stage that sends activations; None: this is the first stage
    last: NodeId  # the stage that draws the tokens
    entry_address: Address
    first_address: Address
    next_address: Address | None  # None: this is the last stage
    pages_from: Address | None = None  # of a node that was sent more of this sequence's beginning; None: no such node is known
    previous_address: Address | None = None  # None: this is the first stage


FetchPages = Callable[[OpenSequence, Address], Awaitable[None]]


class TokenSink(Protocol):
    """Takes peers' frames for this node's own generations (`node.entry.entry.Entry`).

    Both return False if the generation runs here and the sender is not entitled to send the frame.
    """

    def token(self, token: TokenOut, sender: NodeId) -> bool: ...

    def lost(self, lost: SequenceLost, address: Address | None, sender: NodeId) -> bool:
        """`address`: of the stage that failed; None: not known."""


@dataclass(slots=True)
class StagesStatistics:
    """Counters since the start."""

    opened_total: int = 0
    refused_total: int = 0
    hidden_frames_total: int = 0
    token_frames_total: int = 0
    rejected_rows_total: int = 0
    room_granted_total: int = 0
    lost_to_peers_total: int = 0
    foreign_words_total: int = 0  # unauthorized frames: about sequences here, from nodes whose part they are not
    bad_activations_total: int = 0  # sequences for which the previous stage sent activations that are not finite


class Stages:
    """Serves this node's spans to every entry, its own included."""

    def __init__(
        self,
        address: Address,
        engine: Engine,
        post: Post,
        sink: TokenSink,
        span_lost: Callable[[SpanLost], None] | None = None,
        fetch_pages: FetchPages | None = None,
    ) -> None:
        """`fetch_pages`: fetches a sequence's prefix pages from the node at an address; None: they are computed."""
        self._address = address
        self._fetch_pages = fetch_pages
        self._span_lost = span_lost
        self.handlers = {"stage.open": self._on_open}
        self.receivers = {
            "stage.hidden": self._on_hidden,
            "stage.tokens": self._on_tokens,
            "stage.lost": self._on_lost,
            "stage.close": self._on_close,
            "stage.demand": self._on_demand,
        }
        self._engine = engine
        self._rooms: dict[ModelId, RoomGrants] = {}  # of models that requests wait for, or did
        self._entries: dict[NodeId, Address] = {}  # that sent demand
        self._post = post
        self._sink = sink
        self._routes: dict[SequenceKey, OpenStage] = {}
        self._active_at: dict[SequenceKey, float] = {}  # time of the open, or of the engine's latest output
        # By sequence and closing node, so that a close from any other node does not prevent the entry's open.
        self._closed: OrderedDict[tuple[SequenceKey, NodeId], None] = OrderedDict()
        self.refusals = Refusals()  # of unauthorized frames and bad activations, by the node that sent them
        self._compiling = trio.CapacityLimiter(MAX_COMPILATIONS)
        self._counters = StagesStatistics()

    def statistics(self) -> StagesStatistics:
        return replace(self._counters)

    def deliverer(self, token: trio.lowlevel.TrioToken) -> Callable[[list[EngineOutput]], None]:
        """Returns a function for the engine's thread that passes the outputs of one step to `carry` in trio's thread."""

        def deliver(outputs: list[EngineOutput]) -> None:
            try:
                token.run_sync_soon(self.carry, outputs)
            except trio.RunFinishedError:
                pass  # the node has stopped, and the engine is about to

        return deliver

    # --- outputs of the engine

    def carry(self, outputs: list[EngineOutput]) -> None:
        """Sends the outputs of one engine step to their peers, one frame of each kind a peer."""
        hidden: defaultdict[Address, list[HiddenOut]] = defaultdict(list)
        tokens: defaultdict[Address, list[TokenOut]] = defaultdict(list)
        for output in outputs:
            if isinstance(output, SpanLost):
                if self._span_lost is not None:
                    self._span_lost(output)
                continue
            route = self._routes.get(output.key)
            if route is None:
                continue  # closed while the step ran
            self._active_at[output.key] = trio.current_time()
            if isinstance(output, HiddenOut):
                if route.next_address is not None:
                    hidden[route.next_address].append(output)
            elif isinstance(output, TokenOut):
                for address in {route.entry_address, route.first_address}:
                    tokens[address].append(output)
                if output.finish is not None:
                    self._forget(output.key)
            elif output.by_previous:
                self._note_bad_activations(route)
                self._give_up(route, output, route.previous_address)
            else:
                self._give_up(route, output, self._address)
        for address, rows in hidden.items():
            self._send_hidden(address, rows)
        for address, drawn in tokens.items():
            self._send_tokens(address, drawn)
        self._grant_room()

    def _send_hidden(self, address: Address, rows: list[HiddenOut]) -> None:
        header = {"rows": [[*row.key, row.position, row.count, len(row.data), row.names, row.draft, row.rewinds] for row in rows]}
        try:
            self._post(address, "stage.hidden", header, b"".join(row.data for row in rows))
            self._counters.hidden_frames_total += 1
        except PeerLost as error:
            self._lose({row.key for row in rows}, address, error.reason)

    def _send_tokens(self, address: Address, drawn: list[TokenOut]) -> None:
        header = {"tokens": [[*t.key, t.position, t.token, t.finish, t.logprob, t.top, t.cached] for t in drawn]}
        try:
            self._post(address, "stage.tokens", header)
            self._counters.token_frames_total += 1
        except PeerLost as error:
            self._lose({token.key for token in drawn}, address, error.reason)

    def _lose(self, keys: set[SequenceKey], address: Address, reason: str) -> None:
        for key in keys:
            route = self._routes.get(key)
            if route is not None:
                self._counters.lost_to_peers_total += 1
                self._engine.close(key)
                self._give_up(route, SequenceLost(key, f"the link to {format_address(address)} is lost: {reason}"), address)

    def _give_up(self, route: OpenStage, lost: SequenceLost, address: Address | None) -> None:
        self._forget(lost.key)
        header = {
            "key": list(lost.key),
            "reason": lost.reason,
            "retryable": lost.retryable,
            "address": address,
            "no_room": lost.no_room,
        }
        try:
            self._post(route.entry_address, "stage.lost", header)
        except PeerLost:
            pass  # the entry is gone too

    def _note_bad_activations(self, route: OpenStage) -> None:
        self._counters.bad_activations_total += 1
        peer = route.previous or ""
        if self.refusals.note(peer, BAD_ACTIVATIONS, trio.current_time()):
            log.warning("stage.bad_activations", peer=peer, next_in_s=WINDOW_S)

    # --- frames of peers

    async def _on_open(self, sender: NodeId, header: Header, tail: bytes) -> Reply:
        """Opens a sequence; answers with the number of its prefix pages that are cached here.

        Raises:
            BadRequest: the sender is not the sequence's entry, or the sequence can never fit here.
            Refused: the engine is full, or the stream runs here for another entry.
            RemoteError: the entry has closed the sequence already.
        """
        stage = _decode_open(sender, tail)
        key = stage.sequence.key
        if stage.entry != sender:
            raise BadRequest(f"a sequence is opened by its entry, {stage.entry}; this came from {sender}")
        if stage.sequence.sampling.grammar is not None:
            await trio.to_thread.run_sync(self._engine.prepare, stage.sequence, limiter=self._compiling)
        if stage.pages_from is not None and self._fetch_pages is not None and key not in self._routes:
            await self._fetch_pages(stage.sequence, stage.pages_from)
        if (key, sender) in self._closed:  # the close may have come while the grammar was compiled or pages were fetched
            raise RemoteError(sender, "closed before it was opened")
        if key in self._routes and self._routes[key].entry != sender:
            raise Refused(f"stream {key.stream} is computed here for another entry", TAKEN_RETRY_S)
        room = self._rooms.get(stage.sequence.model)
        if room is not None and key not in self._routes and not room.admits(sender, self._engine.room(stage.sequence.model)):
            self._counters.refused_total += 1
            raise Refused("the places that are free here are kept for requests that have waited longer")
        pages = 0
        if key not in self._routes:  # a repeated open changes nothing; its answer of 0 pages only costs a longer prefill
            self._routes[key] = stage
            self._active_at[key] = trio.current_time()
            try:
                pages = self._engine.open(stage.sequence)
            except MeshError:
                self._forget(key)
                self._counters.refused_total += 1
                raise
            self._counters.opened_total += 1
        return {"pages": pages}, b""

    def _on_hidden(self, sender: NodeId, header: Header, tail: bytes) -> None:
        offset = 0
        arrived: list[HiddenOut] = []
        rows = msgspec.convert(header["rows"], list[HiddenRow])
        for stream, choice, attempt, position, count, size_bytes, names, draft, rewinds in rows:
            if size_bytes > len(tail) - offset:
                raise RemoteError(sender, "activations are shorter than the size in their header")
            key = SequenceKey(stream, choice, attempt)
            data = tail[offset : offset + size_bytes]
            offset += size_bytes
            route = self._routes.get(key)
            if route is not None and route.previous != sender:
                self._note_unauthorized(sender, "stage.hidden")
            elif route is not None:
                arrived.append(HiddenOut(key, position, count, data, names, draft, rewinds))
            else:
                self._counters.rejected_rows_total += 1
        self._engine.push(*arrived)

    def _on_tokens(self, sender: NodeId, header: Header, tail: bytes) -> None:
        accepted: list[TokenOut] = []
        to_decode: list[TokenOut] = []
        rows = msgspec.convert(header["tokens"], list[TokenRow])
        for token in [TokenOut(SequenceKey(*row[:3]), *row[3:]) for row in rows]:
            route = self._routes.get(token.key)
            if route is not None and route.last != sender:
                self._note_unauthorized(sender, "stage.tokens")
                continue
            accepted.append(token)
            # The first stage decodes on with the token, unless it is the last stage too: then its engine has drawn the token.
            if route is not None and route.sequence.start == 0 and route.next_address is not None and token.finish is None:
                to_decode.append(token)
        self._engine.token(*to_decode)
        for token in accepted:
            if not self._sink.token(token, sender):
                self._note_unauthorized(sender, "stage.tokens")

    def _on_lost(self, sender: NodeId, header: Header, tail: bytes) -> None:
        lost = msgspec.convert(header, LostStage)
        reported = SequenceLost(SequenceKey(*lost.key), lost.reason[:500], lost.retryable, no_room=lost.no_room)
        if not self._sink.lost(reported, lost.address, sender):
            self._note_unauthorized(sender, "stage.lost")

    def _on_close(self, sender: NodeId, header: Header, tail: bytes) -> None:
        for row in msgspec.convert(header["keys"], list[EncodedKey]):
            key = SequenceKey(*row)
            route = self._routes.get(key)
            self._note_closed(key, sender)
            if route is not None and route.entry != sender:
                self._note_unauthorized(sender, "stage.close")
            else:
                self._forget(key)
                self._engine.close(key)
        self._grant_room()

    def _note_unauthorized(self, sender: NodeId, kind: str) -> None:
        self._counters.foreign_words_total += 1
        if self.refusals.note(sender, UNAUTHORIZED_FRAME, trio.current_time()):
            log.warning("stage.unauthorized_frame", kind=kind, peer=sender, next_in_s=WINDOW_S)

    # --- room for requests that wait at their entries

    def _on_demand(self, sender: NodeId, header: Header, tail: bytes) -> None:
        demand, now = msgspec.convert(header, RoomDemand), trio.current_time()
        if demand.model not in self._rooms and not self._engine.has_model(demand.model):
            return
        heads = [WaitingRequest(continued, priority, now - waited_s) for continued, priority, waited_s in demand.heads]
        self._entries[sender] = demand.address
        self._rooms.setdefault(demand.model, RoomGrants()).demand(sender, heads, demand.received, now)
        self._grant_room()

    def _grant_room(self) -> None:
        """Reserves the places that are free now for the requests that have waited longest, and sends their entries the grants."""
        for model, room in self._rooms.items():
            if not room.waiting:
                continue
            for entry, count in room.grant(self._engine.room(model), trio.current_time()).items():
                self._counters.room_granted_total += count
                try:
                    self._post(self._entries[entry], "stage.room", {"model": model, "count": count})
                except PeerLost:
                    room.forget(entry)

    # --- ends of sequences

    def _forget(self, key: SequenceKey) -> None:
        route = self._routes.pop(key, None)
        self._active_at.pop(key, None)
        if route is not None:
            self._note_closed(key, route.entry)

    def _note_closed(self, key: SequenceKey, entry: NodeId) -> None:
        self._closed[key, entry] = None
        while len(self._closed) > MAX_CLOSED_KEPT:
            self._closed.popitem(last=False)

    def entry_lost(self, node: NodeId, reason: str) -> None:
        """Frees the sequences of the entry `node`, which is gone, or whose opens and closes may have been lost with a link.

        The entry is sent their loss, as it may have been suspended only, or have lost no more than a link.
        """
        for room in self._rooms.values():
            room.forget(node)
        for key, route in [(key, route) for key, route in self._routes.items() if route.entry == node]:
            self._engine.close(key)
            self._give_up(route, SequenceLost(key, f"its stage lost the entry: {reason}"), None)

    def link_lost(self, address: Address, reason: str) -> None:
        """Gives up the sequences whose activations or tokens were sent over a link that broke."""
        sent_over_link = {
            key
            for key, route in self._routes.items()
            if address in (route.next_address, route.first_address, route.entry_address)
        }
        self._lose(sent_over_link, address, reason)

    def sweep(self, now: float) -> None:
        """Frees sequences that have been idle for `IDLE_S`."""
        assert self._active_at.keys() == self._routes.keys()
        for key in [key for key, active_at in self._active_at.items() if now - active_at > IDLE_S]:
            route = self._routes[key]
            self._engine.close(key)
            self._give_up(route, SequenceLost(key, f"nothing came for it for {IDLE_S:g} s"), None)

    @property
    def open_sequences(self) -> int:
        return len(self._routes)

    def route(self, key: SequenceKey) -> OpenStage | None:
        """The open sequence as its entry sent it; None if it is not open here."""
        return self._routes.get(key)


def _decode_open(sender: NodeId, tail: bytes) -> OpenStage:
    try:
        return msgspec.msgpack.decode(tail, type=OpenStage)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"stage.open from {sender}: {error}") from None


@dataclass(frozen=True, slots=True)
class OpenFailure:
    address: Address
    error: MeshError


async def open_path(call: Call, stages: list[tuple[Address, OpenStage]], *, timeout_s: float) -> OpenFailure | None:
    """Opens all stages but the first together, then the first, which begins to compute at once. Returns the first failure.

    The first stage's open contains how many prefix pages every other stage has, so that it starts behind what the whole path has
    cached. After a failure some stages may be open: the caller closes them all.
    """
    failures: list[OpenFailure] = []
    pages: list[int] = []

    async def open_one(address: Address, stage: OpenStage) -> None:
        try:
            header, _ = await call(address, "stage.open", {}, msgspec.msgpack.encode(stage), timeout_s=timeout_s)
            pages.append(msgspec.convert(header, StageOpened).pages)
        except MeshError as error:
            failures.append(OpenFailure(address, error))
        except msgspec.ValidationError as error:
            failures.append(OpenFailure(address, RemoteError(format_address(address), f"no answer to stage.open: {error}")))

    (first_address, first), *others = stages
    async with trio.open_nursery() as nursery:
        for address, stage in others:
            nursery.start_soon(open_one, address, stage)
    if not failures:
        if others and first.sequence.prefix is not None:
            prefix = changed(first.sequence.prefix, elsewhere=min(pages))
            first = changed(first, sequence=changed(first.sequence, prefix=prefix))
        await open_one(first_address, first)
    return failures[0] if failures else None
