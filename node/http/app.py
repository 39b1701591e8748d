"""The node's HTTP application: one layer in front of all routes.

This layer gives every request its id, authenticates it, and turns every error behind it into the
contract's error form. It is the one place in HTTP that goes on after any exception.
"""

from __future__ import annotations

import re
import secrets
import traceback
from collections.abc import Mapping

import structlog
from starlette.requests import Request
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router

from mesh.errors import PeerLost
from mesh.ids import Address
from node.http import documents, generation, openapi, sse, surface
from node.http.auth import OPEN_PATHS, ApiKeys, check_origin
from node.http.connection import App, AsgiMessage, Receive, Scope, Send
from node.http.errors import ClientGone, ErrorAnswer, answer_of, is_expected, single_cause
from node.http.services import NodeServices
from node.http.site import Endpoint, HttpStatistics, Json, Route, Site

log = structlog.get_logger()

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")


async def describe(site: Site, request: Request) -> App:
    return Json(openapi.describe(ROUTES, surface.package_version(), with_keys=site.auth is not None, open_paths=OPEN_PATHS))


ROUTES: tuple[Route, ...] = (
    *surface.ROUTES,
    *generation.ROUTES,
    *documents.ROUTES,
    Route("GET", "/openapi.json", describe, "This description"),
)


def make_app(node: NodeServices, *, auth: ApiKeys | None, bound: Address) -> NodeApp:
    """The ASGI application of a node.

    Args:
        auth: the API keys that are accepted; None: every client on the node's own machine.
        bound: where the HTTP server listens; its host is a name that requests may use.
    """
    return NodeApp(Site(node, auth, bound))


class NodeApp:
    """`ROUTES` behind the door."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.own_headers = ((b"x-mesh-node", site.node.me.encode()),)  # the server's own answers carry them too
        by_path: dict[str, dict[str, Endpoint]] = {}
        for route in ROUTES:
            by_path.setdefault(route.path, {})[route.method] = route.endpoint
        self._router = Router(
            [_starlette_route(site, path, endpoints) for path, endpoints in by_path.items()], redirect_slashes=False
        )

    def statistics(self) -> HttpStatistics:
        return self._site.statistics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts = self._site.counts
        counts.requests += 1
        request_id = _header(scope, b"x-request-id") or ""
        if not REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
        outward = _Outward(send, request_id, self._site)
        scope["app"] = self  # makes Starlette raise for 404 and 405 instead of answering in plain text
        scope["state"] = {"request_id": request_id, "tenant": ""}
        try:
            self._let_in(scope)
            await self._router(scope, receive, outward)
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001  # supervised: per HTTP request
            await self._answer_failure(single_cause(error), scope, outward, request_id)

    def _let_in(self, scope: Scope) -> None:
        """Raises BadRequest, 401 or 403, for a client that may not send this."""
        if self._site.auth is None:
            check_origin(_header(scope, b"host"), _header(scope, b"origin"), self._site.bound)
        elif scope["path"] not in OPEN_PATHS:
            scope["state"]["tenant"] = self._site.auth.tenant(_header(scope, b"authorization"))

    async def _answer_failure(self, error: BaseException, scope: Scope, outward: _Outward, request_id: str) -> None:
        if isinstance(error, ClientGone):
            return
        if not is_expected(error):
            self._site.counts.failures += 1
            # Where, not what: a message or a traceback's values may hold a prompt.
            where = "".join(traceback.format_tb(error.__traceback__)[-4:])
            log.error("http.request_failed", id=request_id, path=scope["path"], error=type(error).__name__, where=where)
        if outward.started and isinstance(error, PeerLost):
            return  # cut, not ended: another node may go on with it
        try:
            await outward.end_with(answer_of(error, self._site.jitter()))
        except ClientGone:
            return


class _Outward:
    """`send`, with the headers that every answer has; records how far the answer has come."""

    def __init__(self, send: Send, request_id: str, site: Site) -> None:
        self._send = send
        self._site = site
        self._own = [(b"x-request-id", request_id.encode()), (b"x-mesh-node", site.node.me.encode())]
        self.started = False
        self._is_stream = False

    async def __call__(self, message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], *self._own]
            self.started = True
            self._is_stream = (b"content-type", sse.HEADERS[0][1]) in headers
            status = str(message["status"])
            self._site.counts.answers[status] = self._site.counts.answers.get(status, 0) + 1
            message = {**message, "headers": headers}
        await self._send(message)

    async def end_with(self, answer: ErrorAnswer) -> None:
        """Makes the error the answer, or the end of a stream that is under way; what else is under way is cut short."""
        if not self.started:
            body = answer.encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *answer.headers]
            await self({"type": "http.response.start", "status": answer.status, "headers": headers})
            await self({"type": "http.response.body", "body": body})
        elif self._is_stream:
            self._site.counts.streams_failed += 1
            await self({"type": "http.response.body", "body": sse.encode_error(answer.body)})


def _starlette_route(site: Site, path: str, endpoints: Mapping[str, Endpoint]) -> StarletteRoute:
    async def answer(request: Request) -> App:
        method = "GET" if request.method == "HEAD" else request.method
        return await endpoints[method](site, request)

    return StarletteRoute(path, answer, methods=list(endpoints))


def _header(scope: Scope, name: bytes) -> str | None:
    for known, value in scope["headers"]:
        if known == name:
            return str(value, "latin-1")
    return None
