"""How a client talks to a mesh, without I/O: which node to ask, when to ask again, where to go on with a stream that broke.

To go on it asks `GET /v1/streams/{id}` of another node. Nodes of this release do not answer that yet, nor read the
`Idempotency-Key` of a POST: a stream whose own node dies ends with `PeerLost`, and a POST whose answer got lost is carried
out again by the node that is asked next.

A flow is a generator: it yields an effect (`SendRequest`, `ReadBody`, `Sleep`, `YieldChunk`), is sent its outcome and
returns the answer. `mesh.client.client` carries the effects out, once with blocking calls and once under
trio, so all that is decided is decided here. Each call has one budget for all its retries; while a
stream makes progress its budget is made new, since it limits getting nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from mesh.client.event_stream import AnswerChunk, AnswerProgress, EventDecoder
from mesh.errors import BadRequest, DeadlineExceeded, MeshError, PeerLost, Refused, RemoteError

T = TypeVar("T")

SILENCE_S = 10.0  # an open stream pings every 5 s: twice that is taken for death
ANSWER_S = 600.0  # how long a whole answer may take
LOOK_S = 5.0  # status and the like
BACKOFF_S = 0.1  # before the second round over all nodes; doubles with each round
RETRY_AFTER_LIMIT_S = 60.0  # the longest a node may ask a client to wait


class NoNodeAnswers(MeshError):
    """None of the nodes a client knows could be reached. Nothing was done."""


@dataclass(frozen=True, slots=True)
class SendRequest:
    """Sends this request to `node`; gives `HttpResponse` or `ConnectionFailed`. With `streaming`, `ReadBody` reads a 2xx body."""

    node: str
    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    streaming: bool = False
    silence_s: float = ANSWER_S  # longest time without a byte


@dataclass(frozen=True, slots=True)
class ReadBody:
    """Read on in the open answer; outcome: bytes (empty: its regular end) or `ConnectionFailed`."""


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class YieldChunk:
    """Hand a chunk to the reader of the stream."""

    chunk: AnswerChunk


@dataclass(frozen=True, slots=True)
class HttpResponse:
    node: str
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""

    def json(self) -> Any:
        """Raises RemoteError when the body is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise RemoteError(self.node, f"expected JSON, got {self.body[:60]!r}; is this the HTTP address of a node?") from None


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The request or its answer did not come through."""

    reason: str


FlowEffect = SendRequest | ReadBody | Sleep | YieldChunk
Flow = Generator[FlowEffect, Any, T]


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """What one call may spend on retries, all causes together."""

    retries: int = 16
    waiting_s: float = 30.0


class KnownNodes:
    """The nodes a client knows, in the order in which it would ask them."""

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
        self.answered = False  # some node has answered once, so the addresses are right
        self.learned = False
        self._down: set[str] = set()  # failed since they were last heard to be alive

    def order(self) -> list[str]:
        """All nodes, those that failed of late last."""
        up = [url for url in self.urls if url not in self._down]
        start = int(self.draw() * len(up)) if self.spread else 0
        return up[start:] + up[:start] + [url for url in self.urls if url in self._down]

    def failed(self, url: str) -> None:
        """Asks `url` last from now on, and learns anew from the next node that answers."""
        if url in self.urls:
            self.urls.remove(url)
            self.urls.append(url)
            self._down.add(url)
        self.learned = False

    def learn(self, status: Mapping[str, Any]) -> None:
        """Takes the live nodes of a `/mesh/status`; those known before stay, since they may come back."""
        for node in status.get("nodes", ()):
            url = str(node.get("http") or "").rstrip("/")
            if url and node.get("state") in ("alive", "suspect"):
                self._down.discard(url)
                if url not in self.urls:
                    self.urls.append(url)
        self.learned = True


def checked_url(url: str) -> str:
    """Raises BadRequest unless `url` is `http(s)://HOST[:PORT]`."""
    plain = url.rstrip("/")
    scheme, separator, host = plain.partition("://")
    port = host.rpartition(":")[2] if ":" in host.rpartition("]")[2] else "0"
    if scheme not in ("http", "https") or not separator or not host or "/" in host or not port.isdigit() or int(port) > 65535:
        raise BadRequest(f"expected a node's URL such as http://127.0.0.1:8000, got {url!r}", "node")
    return plain


class RetrySchedule:
    """Where one call goes next: to every node once, then a pause, then round again, until the budget is spent."""

    def __init__(self, nodes: KnownNodes, budget: RetryBudget, draw: Callable[[], float]) -> None:
        self.nodes = nodes
        self.budget = budget
        self.draw = draw
        self.retries = 0  # all of them, for statistics
        self.fresh()

    def fresh(self) -> None:
        """The call got further: its budget begins anew."""
        self._order = self.nodes.order()
        self._round = self._spent = 0
        self._waited_s = 0.0
        self._asked_s: float | None = None  # shortest wait that a node of this round asked for
        self._reasons: dict[str, str] = {}
        self._refused: Refused | None = None

    @property
    def node(self) -> str:
        return self._order[0]

    def broken(self, node: str, outcome: ConnectionFailed) -> float:
        """The pause before the next try, 0 for none.

        Raises:
            NoNodeAnswers: the budget is spent, or no node ever answered this client: a wrong address is not retried.
        """
        self.nodes.failed(node)
        self._reasons[node] = outcome.reason
        return self._advance(node)

    def refused(self, node: str, error: Refused) -> float:
        """The pause before the next try. A quota holds on all nodes, so it is waited for.

        Raises:
            Refused: the budget is spent.
        """
        self._refused = error
        asked_s = min(error.retry_after_s, RETRY_AFTER_LIMIT_S)
        self._asked_s = asked_s if self._asked_s is None else min(self._asked_s, asked_s)
        return self._advance(node, round_over=error.quota)

    def _advance(self, node: str, *, round_over: bool = False) -> float:
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
        return pause_s

    def _given_up(self) -> MeshError:
        if self._refused is not None:
            return self._refused
        reasons = "; ".join(f"{node}: {reason}" for node, reason in self._reasons.items())
        return NoNodeAnswers(f"no node answers ({reasons}); start one with `mesh up`, or name one with --node URL or $MESH_NODE")


def error_of(answer: HttpResponse) -> MeshError:
    """What a node's answer outside 2xx means to the caller."""
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
    """`retry-after-ms` before `Retry-After`, which whole seconds make coarse; 1 s where neither is a number."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit_s)
        except (KeyError, ValueError):
            continue
    return 1.0


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
        """Asks the first node that answers for the others, once, so that the loss of those known can be survived."""
        if self.nodes.learned:
            return
        for node in self.nodes.order():
            answer = yield SendRequest(node, "GET", "/mesh/status", headers=self.headers, silence_s=LOOK_S)
            if isinstance(answer, ConnectionFailed):
                self.nodes.failed(node)
                continue
            self.nodes.answered = True
            self.nodes.learn(answer.json() if answer.status == 200 else {})
            return
        # No one answered: the call itself will say so.

    def call(
        self, method: str, path: str, body: bytes = b"", content_type: str = "", silence_s: float = ANSWER_S
    ) -> Flow[HttpResponse]:
        """One request and its whole answer, from whichever node gives it.

        Every try of a POST carries the same Idempotency-Key, for nodes that will read it.

        Raises:
            NoNodeAnswers, Refused, BadRequest, DeadlineExceeded, RemoteError
        """
        yield from self.learn()
        tries = RetrySchedule(self.nodes, self.budget, self.draw)
        request = SendRequest("", method, path, body, self._headers(method, content_type), silence_s=silence_s)
        while True:
            answer = yield replace(request, node=tries.node)
            if isinstance(answer, HttpResponse) and answer.status < 300:
                self.nodes.answered = True
                return answer
            yield from self._wait(tries, tries.node, answer)

    def stream(self, path: str, body: bytes, progress: AnswerProgress, tries: RetrySchedule) -> Flow[None]:
        """One streamed answer, chunk by chunk, over as many nodes as it takes where they can go on with it.

        Raises:
            PeerLost: the stream broke, and no node can go on with it.
            NoNodeAnswers, Refused, BadRequest, DeadlineExceeded, RemoteError: as `call`.
        """
        first = SendRequest(
            "", "POST", path, body, self._headers("POST", "application/json"), streaming=True, silence_s=SILENCE_S
        )
        request = first
        yield from self.learn()
        tries.fresh()
        broken_on = story = ""
        while True:
            node = tries.node
            answer = yield replace(request, node=node)
            if isinstance(answer, ConnectionFailed) or answer.status >= 300:
                if request is not first and isinstance(answer, HttpResponse) and answer.status in (404, 405, 501):
                    raise PeerLost(broken_on, f"{story}, and {node} cannot go on with it: {_why_not_resumed(answer)}; ask again")
                yield from self._wait(tries, node, answer)
                continue
            self.nodes.answered = True
            progress.resumes += request is not first
            progress.stream = progress.stream or answer.headers.get("x-mesh-stream", "")
            seq = progress.seq
            end = yield from self._read(node, progress)
            if end is None:
                return
            broken_on, story = node, f"stream {progress.stream} broke after {progress.seq} tokens ({end.reason})"
            if progress.seq > seq:
                tries.fresh()
            yield from self._wait(tries, node, end)
            if progress.stream:  # else it has no name to ask for it by: the same POST again
                path = f"/v1/streams/{progress.stream}?starting_after={progress.seq}"
                request = SendRequest("", "GET", path, headers=self.headers, streaming=True, silence_s=SILENCE_S)

    def _read(self, node: str, progress: AnswerProgress) -> Flow[ConnectionFailed | None]:
        """Emits what comes; None after `[DONE]`, else how it broke off."""
        decoder = EventDecoder(node)
        while True:
            received = yield ReadBody()
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
        """Makes ready for the next try, or raises what the outcome means."""
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
    """Of a node that was asked for a stream by its id. The status of a route that is not there would tell a person nothing."""
    if answer.status == 404:
        return str(error_of(answer))
    return "it keeps no stream for another node"


def stream_error(node: str, error: Mapping[str, Any]) -> MeshError:
    """An `error` event ends a stream for good; its type says whose fault it was."""
    message = str(error.get("message") or "the stream failed without an error message")
    if error.get("type") == "invalid_request_error":
        return BadRequest(message, error.get("param"), error.get("code"))
    if error.get("code") in ("deadline_exceeded", "timeout"):
        return DeadlineExceeded(message)
    return RemoteError(node, message)
