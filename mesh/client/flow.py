"""The client's decisions, without I/O: which node to call, when to retry, and where to resume a broken stream.

A stream is resumed with `GET /v1/streams/{id}` at another node. Nodes of this release do not answer that yet, nor read the
`Idempotency-Key` of a POST: a stream whose own node dies ends with `PeerLost`, and a POST whose answer is lost is carried
out again by the next node.

A flow is a generator: it yields an effect (`SendRequest`, `ReadBody`, `Sleep`, `YieldChunk`), is sent the outcome, and
returns the answer. `mesh.client.client` carries the effects out, with blocking calls and under trio, and decides nothing.
Each call has one budget for all its retries. A stream that makes progress gets its budget anew, because the budget limits
tries without progress.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from mesh.client.event_stream import AnswerChunk, AnswerProgress, EventDecoder
from mesh.errors import BadRequest, DeadlineExceeded, MeshError, PeerLost, Refused, RemoteError
from mesh.json_object import JsonObject

T = TypeVar("T")

SILENCE_S = 10.0  # an open stream pings every 5 s; after twice that without a byte it counts as broken
ANSWER_S = 600.0  # for a whole answer that is not streamed
LOOK_S = 5.0  # for status and similar calls
BACKOFF_S = 0.1  # before the second round over all nodes; doubles with each round
MAX_RETRY_WAIT_S = 60.0  # longer waits that a node asks for are shortened to this


class NoNodeAnswers(MeshError):
    """None of the nodes that the client has addresses of could be reached. Nothing was done."""


@dataclass(frozen=True, slots=True)
class SendRequest:
    """Sends a request; the outcome is `HttpResponse` or `ConnectionFailed`. With `streaming`, `ReadBody` reads a 2xx body."""

    node: str
    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    streaming: bool = False
    silence_s: float = ANSWER_S  # longest time without a byte


@dataclass(frozen=True, slots=True)
class ReadBody:
    """Reads the next bytes of the open answer; the outcome is bytes (empty at its regular end) or `ConnectionFailed`."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Waits; the outcome is None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class YieldChunk:
    """Gives a chunk to the reader of the stream; the outcome is None."""

    chunk: AnswerChunk


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A node's answer. `body` is empty where the answer is streamed."""

    node: str
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""

    def json(self) -> Any:
        """Parses the body. Raises RemoteError when it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise RemoteError(self.node, f"expected JSON, got {self.body[:60]!r}; is this the HTTP address of a node?") from None


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The request was not sent, or its answer was not received completely."""

    reason: str


FlowEffect = SendRequest | ReadBody | Sleep | YieldChunk
FlowOutcome = HttpResponse | ConnectionFailed | bytes | None
Flow = Generator[FlowEffect, FlowOutcome, T]


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """The limits of one call's retries, for all causes together."""

    retries: int = 16
    waiting_s: float = 30.0


class KnownNodes:
    """The addresses of the nodes, in the order in which the client calls them."""

    def __init__(self, urls: Iterable[str], draw: Callable[[], float], *, spread: bool = False) -> None:
        """`spread`: each call begins at a random node instead of the last one that answered.

        Raises:
            BadRequest: a URL that is not `http://HOST:PORT` or `https://…`, or none at all.
        """
        self.urls = [checked_url(url) for url in urls]
        if not self.urls:
            raise BadRequest("expected at least one node URL such as http://127.0.0.1:8000, got none", "nodes")
        self.draw = draw
        self.spread = spread
        self.answered = False  # a node has answered before, so at least one address is right
        self.learned = False
        self._down: set[str] = set()  # failed, and not reported alive since

    def order(self) -> list[str]:
        """Returns all nodes in the order of calls; recently failed nodes come last."""
        up = [url for url in self.urls if url not in self._down]
        start = int(self.draw() * len(up)) if self.spread else 0
        return up[start:] + up[:start] + [url for url in self.urls if url in self._down]

    def failed(self, url: str) -> None:
        """Moves `url` to the end, and makes the next call fetch the list of nodes again."""
        if url in self.urls:
            self.urls.remove(url)
            self.urls.append(url)
            self._down.add(url)
        self.learned = False

    def learn(self, status: JsonObject) -> None:
        """Adds the live nodes of a `/mesh/status`. Earlier nodes stay, because they may return."""
        for node in status.get("nodes", ()):
            url = str(node.get("http") or "").rstrip("/")
            if url and node.get("state") in ("alive", "suspect"):
                self._down.discard(url)
                if url not in self.urls:
                    self.urls.append(url)
        self.learned = True


def checked_url(url: str) -> str:
    """Returns the URL without a slash at its end. Raises BadRequest unless it is `http(s)://HOST[:PORT]`."""
    plain = url.rstrip("/")
    scheme, separator, host = plain.partition("://")
    port = host.rpartition(":")[2] if ":" in host.rpartition("]")[2] else "0"
    if scheme not in ("http", "https") or not separator or not host or "/" in host or not port.isdigit() or int(port) > 65535:
        raise BadRequest(f"expected a node's URL such as http://127.0.0.1:8000, got {url!r}", "node")
    return plain


class RetrySchedule:
    """Chooses the node of each try: every node once, then a pause, then every node again, until the budget is spent."""

    def __init__(self, nodes: KnownNodes, budget: RetryBudget, draw: Callable[[], float]) -> None:
        self.nodes = nodes
        self.budget = budget
        self.draw = draw
        self.retries = 0  # of the whole call, for statistics
        self.fresh()

    def fresh(self) -> None:
        """Starts the budget anew: the call has made progress."""
        self._order = self.nodes.order()
        self._round = self._spent = 0
        self._waited_s = 0.0
        self._asked_s: float | None = None  # the shortest wait that a node of this round asked for
        self._reasons: dict[str, str] = {}
        self._refused: Refused | None = None

    @property
    def node(self) -> str:
        return self._order[0]

    def broken(self, node: str, outcome: ConnectionFailed) -> float:
        """Counts a failed connection. Returns the pause before the next try, 0 for none.

        Raises:
            NoNodeAnswers: the budget is spent, or no node has ever answered this client: a wrong address is not retried.
        """
        self.nodes.failed(node)
        self._reasons[node] = outcome.reason
        return self._advance(node)

    def refused(self, node: str, error: Refused) -> float:
        """Counts a refusal. Returns the pause before the next try. A quota holds on all nodes, so no other node is tried first.

        Raises:
            Refused: the budget is spent.
        """
        self._refused = error
        asked_s = min(error.retry_after_s, MAX_RETRY_WAIT_S)
        self._asked_s = asked_s if self._asked_s is None else min(self._asked_s, asked_s)
        return self._advance(node, round_over=error.quota)

    def _advance(self, node: str, *, round_over: bool = False) -> float:
        """Goes to the next node, or into the next round after a pause; returns the pause."""
        self._order = [other for other in self._order if other != node]
        self._spent += 1
        if self._spent > self.budget.retries:
            raise self._given_up()
        self.retries += 1
        if self._order and not round_over:
            return 0.0
        if not self.nodes.answered:
            raise self._given_up()
        pause_s = BACKOFF_S * 2**self._round * (0.5 + self.draw()) if self._asked_s is None else self._asked_s
        if self._waited_s + pause_s > self.budget.waiting_s:
            raise self._given_up()
        self._waited_s += pause_s
        self._round += 1
        self._asked_s = None
        self._order = self.nodes.order()
        assert self._order, "a client has at least one node"
        return pause_s

    def _given_up(self) -> MeshError:
        if self._refused is not None:
            return self._refused
        reasons = "; ".join(f"{node}: {reason}" for node, reason in self._reasons.items())
        return NoNodeAnswers(f"no node answers ({reasons}); start one with `mesh up`, or name one with --node URL or $MESH_NODE")


def error_of(answer: HttpResponse) -> MeshError:
    """Returns the error of an answer outside 2xx."""
    try:
        error = json.loads(answer.body).get("error") or {}
    except (ValueError, AttributeError):
        error = {}
    message = str(error.get("message") or f"{answer.node} answered {answer.status} without an error message")
    match answer.status:
        case 429 | 503:
            return Refused(message, retry_after_s(answer.headers), quota=answer.status == 429)
        case 504:
            return DeadlineExceeded(message)
        case status if 400 <= status < 500:
            return BadRequest(message, error.get("param"), error.get("code"), status)
    return RemoteError(answer.node, f"{answer.status}: {message}")


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Returns `retry-after-ms`, else `Retry-After`, which has whole seconds only, in seconds; 1 s where neither is a number."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit_s)
        except (KeyError, ValueError):
            continue
    return 1.0


def exchange(request: SendRequest) -> Flow[HttpResponse | ConnectionFailed]:
    """Sends a request and returns its outcome."""
    outcome = yield request
    assert isinstance(outcome, HttpResponse | ConnectionFailed)
    return outcome


class ClientCore:
    """One client's state between calls, and the flows of its two kinds of call."""

    def __init__(
        self, nodes: KnownNodes, api_key: str | None, budget: RetryBudget, draw: Callable[[], float], new_key: Callable[[], str]
    ) -> None:
        self.nodes = nodes
        self.budget = budget
        self.draw = draw
        self.new_key = new_key
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def learn(self) -> Flow[None]:
        """Fetches the addresses of the other nodes once, so that the client survives the loss of its first nodes."""
        if self.nodes.learned:
            return
        for node in self.nodes.order():
            answer = yield from exchange(SendRequest(node, "GET", "/mesh/status", headers=self.headers, silence_s=LOOK_S))
            if isinstance(answer, ConnectionFailed):
                self.nodes.failed(node)
                continue
            self.nodes.answered = True
            self.nodes.learn(answer.json() if answer.status == 200 else {})
            return
        # No node answered: the call itself raises the error.

    def call(
        self, method: str, path: str, body: bytes = b"", content_type: str = "", silence_s: float = ANSWER_S
    ) -> Flow[HttpResponse]:
        """Sends one request to the nodes in turn until one of them gives the whole answer.

        Every try of a POST has the same Idempotency-Key, which later releases will read.

        Raises:
            NoNodeAnswers, Refused, BadRequest, DeadlineExceeded, RemoteError
        """
        yield from self.learn()
        tries = RetrySchedule(self.nodes, self.budget, self.draw)
        request = SendRequest("", method, path, body, self._headers(method, content_type), silence_s=silence_s)
        while True:
            answer = yield from exchange(replace(request, node=tries.node))
            if isinstance(answer, HttpResponse) and answer.status < 300:
                self.nodes.answered = True
                return answer
            yield from self._wait(tries, tries.node, answer)

    def stream(self, path: str, body: bytes, progress: AnswerProgress, tries: RetrySchedule) -> Flow[None]:
        """Yields one streamed answer chunk by chunk; a broken stream is resumed at other nodes where they can.

        Raises:
            PeerLost: the stream broke, and no node can resume it.
            NoNodeAnswers, Refused, BadRequest, DeadlineExceeded, RemoteError: as `call`.
        """
        first = SendRequest(
            "", "POST", path, body, self._headers("POST", "application/json"), streaming=True, silence_s=SILENCE_S
        )
        request = first
        yield from self.learn()
        tries.fresh()
        broken_on = breakage = ""
        while True:
            node = tries.node
            answer = yield from exchange(replace(request, node=node))
            if isinstance(answer, ConnectionFailed) or answer.status >= 300:
                # A node that has no route for streams, or not this stream, cannot resume it: no other try would help.
                if request is not first and isinstance(answer, HttpResponse) and answer.status in (404, 405, 501):
                    reason = _why_not_resumed(answer)
                    raise PeerLost(broken_on, f"{breakage}, and {node} cannot go on with it: {reason}; ask again")
                yield from self._wait(tries, node, answer)
                continue
            self.nodes.answered = True
            progress.resumes += request is not first
            progress.stream = progress.stream or answer.headers.get("x-mesh-stream", "")
            seq = progress.seq
            end = yield from self._read(node, progress)
            if end is None:
                return
            broken_on, breakage = node, f"stream {progress.stream} broke after {progress.seq} tokens ({end.reason})"
            if progress.seq > seq:
                tries.fresh()
            yield from self._wait(tries, node, end)
            assert progress.seq >= seq
            if progress.stream:  # a stream without an id cannot be resumed: the same POST is sent again
                path = f"/v1/streams/{progress.stream}?starting_after={progress.seq}"
                request = SendRequest("", "GET", path, headers=self.headers, streaming=True, silence_s=SILENCE_S)

    def _read(self, node: str, progress: AnswerProgress) -> Flow[ConnectionFailed | None]:
        """Yields the new chunks of the open answer. Returns None after `[DONE]`, else how the stream broke."""
        decoder = EventDecoder(node)
        while True:
            received = yield ReadBody()
            assert isinstance(received, bytes | ConnectionFailed)
            if isinstance(received, ConnectionFailed):
                return received
            if not received:
                return ConnectionFailed("it ended without [DONE]")
            for event in decoder.feed(received):
                if event == "[DONE]":
                    return None
                try:
                    chunk = json.loads(event)
                except ValueError:
                    raise RemoteError(node, f"expected JSON in its event stream, got {event[:60]!r}") from None
                if not isinstance(chunk, dict):
                    raise RemoteError(node, f"expected objects in its event stream, got {event[:60]!r}")
                if error := chunk.get("error"):
                    raise stream_error(node, error)
                if progress.accept(chunk):
                    yield YieldChunk(chunk)

    def _wait(self, tries: RetrySchedule, node: str, outcome: HttpResponse | ConnectionFailed) -> Flow[None]:
        """Waits before the next try, or raises the error of an outcome that is not retried."""
        if isinstance(outcome, ConnectionFailed):
            pause_s = tries.broken(node, outcome)
        else:
            self.nodes.answered = True
            error = error_of(outcome)
            if not isinstance(error, Refused):
                raise error
            pause_s = tries.refused(node, error)
        if pause_s:
            yield Sleep(pause_s)

    def _headers(self, method: str, content_type: str) -> dict[str, str]:
        headers = dict(self.headers)
        if content_type:
            headers["content-type"] = content_type
        if method == "POST":
            headers["idempotency-key"] = self.new_key()
        return headers


def _why_not_resumed(answer: HttpResponse) -> str:
    """Returns why a node did not resume a stream. The status of a missing route (405, 501) would not explain it to a user."""
    if answer.status == 404:
        return str(error_of(answer))
    return "it keeps no stream for another node"


def stream_error(node: str, error: JsonObject) -> MeshError:
    """Returns the error of an `error` event, which ends a stream for good; its type and code choose the class."""
    message = str(error.get("message") or "the stream failed without an error message")
    if error.get("type") == "invalid_request_error":
        return BadRequest(message, error.get("param"), error.get("code"))
    if error.get("code") in ("deadline_exceeded", "timeout"):
        return DeadlineExceeded(message)
    return RemoteError(node, message)
