"""An HTTP/1.1 server for ASGI applications on trio: accepts, bounds, drains.

Why our own: the trio servers there are shield their writes, so one client that stops reading keeps a node
from shutting down. Here cancelling `serve` ends every connection at once; `Server.drain` lets answers that
are under way go on for a while first.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import trio

from mesh.errors import Refused
from node.http.connection import App, Connection, ServerCounts, refusal
from node.http.errors import answer_of
from node.http.limits import Limits


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    connections: int
    connections_total: int
    connections_refused_total: int
    requests_total: int
    framing_errors_total: int
    stalled_readers_total: int
    hung_up_total: int
    bodies_bytes: int  # of requests that are being answered


class Server:
    """What `serve` hands to its caller: drain and statistics."""

    def __init__(self, app: App, limits: Limits, own_headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self._app = app
        self._limits = limits
        self._own_headers = own_headers
        self._counts = ServerCounts()
        self._open: set[Connection] = set()
        self._accepted = 0
        self._refused = 0
        self._refusing = 0
        self._drain_asked = trio.Event()
        self._drain_s = 0.0

    def drain(self, within_s: float) -> None:
        """Accept nothing more; `serve` returns when all answers are out, `within_s` seconds from now at the latest.

        What is not complete by then is cut without its terminating chunk, so that no client takes it for whole.
        """
        self._drain_s = within_s
        self._drain_asked.set()
        for connection in self._open:
            connection.finish_soon()

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(
            connections=len(self._open),
            connections_total=self._accepted,
            connections_refused_total=self._refused,
            requests_total=self._counts.requests,
            framing_errors_total=self._counts.framing_errors,
            stalled_readers_total=self._counts.stalled_readers,
            hung_up_total=self._counts.hung_up,
            bodies_bytes=self._counts.bodies_bytes,
        )

    async def run(self, listeners: Sequence[trio.abc.Listener[trio.abc.Stream]], task_status: trio.TaskStatus[Server]) -> None:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(partial(trio.serve_listeners, self._take, list(listeners), handler_nursery=connections))
                task_status.started(self)
                await self._drain_asked.wait()
                accepting.cancel_scope.cancel()  # closes the listeners
            connections.cancel_scope.deadline = trio.current_time() + self._drain_s

    async def _take(self, stream: trio.abc.Stream) -> None:
        if len(self._open) >= self._limits.connections:
            await self._turn_away(stream)
            return
        self._accepted += 1
        connection = Connection(stream, self._app, self._limits, self._counts, self._own_headers)
        connection.last = self._drain_asked.is_set()
        self._open.add(connection)
        try:
            await connection.run()
        finally:
            self._open.discard(connection)

    async def _turn_away(self, stream: trio.abc.Stream) -> None:
        """503 to one connection too many; nothing at all when even those are many."""
        self._refused += 1
        self._refusing += 1
        try:
            if self._refusing <= self._limits.refusals:
                busy = Refused(f"this node serves {self._limits.connections} connections at a time and all are taken", 1.0)
                answer = answer_of(busy, jitter=secrets.randbelow(1000) / 1000)
                with trio.move_on_after(self._limits.linger_s):
                    try:
                        await stream.send_all(refusal(answer, self._own_headers))
                        if isinstance(stream, trio.SocketStream):
                            await stream.send_eof()
                        await stream.receive_some(self._limits.head_bytes)
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        pass
        finally:
            self._refusing -= 1
            await trio.aclose_forcefully(stream)


async def serve(
    app: App,
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
    limits: Limits | None = None,
    *,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `app` on `listeners` until cancelled, or until `Server.drain` is done. Closes the listeners.

    Args:
        app: its attribute `own_headers`, if it has one, is added to the answers that the server gives by itself
            (framing errors, too many connections).
        listeners: TCP listeners, or `trio.SSLListener`s round them (with `https_compatible=True`).
        task_status: is given the `Server`.
    """
    await Server(app, limits or Limits(), tuple(getattr(app, "own_headers", ()))).run(listeners, task_status)
