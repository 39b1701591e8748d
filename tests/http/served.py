"""A real server on loopback round a fake node, and clients that speak raw bytes to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
import trio

from node.http.app import NodeApp, make_app
from node.http.auth import ApiKeys
from node.http.connection import App
from node.http.limits import Limits
from node.http.server import Server, serve
from tests.http.fake_node import FakeNode


@dataclass
class Served:
    node: FakeNode
    app: NodeApp
    server: Server
    port: int
    scope: trio.CancelScope  # round `serve` alone, so that a test outlives its cancellation
    stopped: trio.Event  # `serve` has returned

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """One request on a connection of its own."""
        raw = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        all_headers = {"host": f"127.0.0.1:{self.port}", "connection": "close", **(headers or {})}
        if body is not None:
            all_headers.setdefault("content-type", "application/json")
            all_headers["content-length"] = str(len(raw))
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
        async with await self.connect() as stream:
            await stream.send_all(head.encode() + b"\r\n" + raw)
            return parse_reply(await read_all(stream), method)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool  # ended as HTTP demands, not cut

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> dict[str, Any]:
        fields = self.json()["error"]
        more = {"progress", "layers", "eta_s"} if fields["code"] == "model_loading" else set()
        assert set(fields) == {"message", "type", "param", "code", *more}
        found: dict[str, Any] = fields
        return found

    def events(self) -> list[Any]:
        """The data of an SSE body; `[DONE]` as that text."""
        found = []
        for line in self.body.decode().split("\n"):
            if line.startswith("data: "):
                text = line.removeprefix("data: ")
                found.append(text if text == "[DONE]" else msgspec.json.decode(text))
        return found


async def read_all(stream: trio.abc.ReceiveStream, limit_bytes: int = 64 << 20) -> bytes:
    """To the end, or to a reset."""
    received = bytearray()
    while len(received) < limit_bytes:
        try:
            part = await stream.receive_some(65536)
        except trio.BrokenResourceError:
            break
        if not part:
            break
        received += part
    return bytes(received)


def parse_reply(raw: bytes, method: str = "GET") -> Reply:
    return parse_replies(raw, [method])[0]


def parse_replies(raw: bytes, methods: list[str]) -> list[Reply]:
    """The answers on one connection, in order, checked by h11 as a client sees them."""
    client = h11.Connection(h11.CLIENT)
    client.receive_data(raw)
    client.receive_data(b"")
    replies = []
    for method in methods:
        client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        head, body, whole = None, bytearray(), False
        while True:
            try:
                event = client.next_event()
            except h11.RemoteProtocolError:
                break
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                whole = True
                break
            elif not isinstance(event, h11.InformationalResponse):
                break
        assert head is not None, f"no answer in {raw[:200]!r}"
        headers = {name.decode(): value.decode() for name, value in head.headers}
        replies.append(Reply(head.status_code, headers, bytes(body), whole))
        if client.our_state is h11.DONE and client.their_state is h11.DONE:
            client.start_next_cycle()
    return replies


@asynccontextmanager
async def serving(app: App, limits: Limits | None = None) -> AsyncIterator[tuple[Server, int, trio.CancelScope, trio.Event]]:
    """Any ASGI application on a free port of loopback."""
    stopped, scope = trio.Event(), trio.CancelScope()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]

    async def run(task_status: trio.TaskStatus[Server]) -> None:
        with scope:
            await serve(app, listeners, limits, task_status=task_status)
        stopped.set()

    async with trio.open_nursery() as nursery:
        server = await nursery.start(run)
        yield server, port, scope, stopped
        scope.cancel()


@asynccontextmanager
async def served(
    node: FakeNode | None = None, limits: Limits | None = None, auth: ApiKeys | None = None
) -> AsyncIterator[Served]:
    """A fake node behind the real application and server."""
    node = node or FakeNode()
    app = make_app(node, auth=auth, bound=("127.0.0.1", 0))
    async with serving(app, limits) as (server, port, scope, stopped):
        yield Served(node, app, server, port, scope, stopped)


async def ask_in_memory(app: NodeApp, chat: dict[str, Any], sent: list[tuple[float, bytes]], write_s: float = 0.0) -> None:
    """A chat request without a socket, so that time may jump; `sent` gets the parts of the body with their times."""
    parts = [{"type": "http.request", "body": msgspec.json.encode(chat), "more_body": False}]

    async def receive() -> Any:
        if parts:
            return parts.pop()
        await trio.sleep_forever()

    async def send(message: Any) -> None:
        await trio.sleep(write_s)
        if message["type"] == "http.response.body":
            sent.append((trio.current_time(), message["body"]))

    headers = [(b"host", b"localhost"), (b"content-length", b"1")]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"", "headers": headers}
    await app(scope, receive, send)
