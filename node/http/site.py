"""What every route has at hand, and the small manners they share: bodies in, JSON out, lists in pages."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mesh.errors import BadRequest
from mesh.ids import Address
from mesh.json_object import JsonObject
from node.http.auth import ApiKeys
from node.http.connection import App
from node.http.errors import ClientGone, unexpected_field
from node.http.services import NodeServices

Endpoint = Callable[["Site", Request], Awaitable[App]]

PAGE_ITEMS = 10_000  # OpenAI's own limit for files


@dataclass(slots=True)
class HttpCounts:
    """What the application answered; published as `HttpStatistics`."""

    requests: int = 0
    answers: dict[str, int] = field(default_factory=dict)  # by status
    failures: int = 0  # exceptions that no refusal explains: each one is a bug
    streams: int = 0  # SSE answers that are open
    streams_failed: int = 0


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    requests_total: int
    answers_total: dict[str, int]
    failures_total: int
    streams: int
    streams_failed_total: int


@dataclass(frozen=True, slots=True)
class Site:
    node: NodeServices
    auth: ApiKeys | None
    bound: Address
    counts: HttpCounts = field(default_factory=HttpCounts)

    def jitter(self) -> float:
        """From 0 to 1, for one answer's Retry-After."""
        return random.random()

    def statistics(self) -> HttpStatistics:
        counts = self.counts
        return HttpStatistics(
            requests_total=counts.requests,
            answers_total=dict(counts.answers),
            failures_total=counts.failures,
            streams=counts.streams,
            streams_failed_total=counts.streams_failed,
        )


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path. `body` is the struct of its JSON body, for `/openapi.json`."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    body: type[msgspec.Struct] | None = None
    multipart: bool = False


class Json(Response):
    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return msgspec.json.encode(content)


async def read_json(request: Request) -> bytes:
    """The body of a request that must have one, in JSON.

    Raises:
        BadRequest: 411 without a length, 415 for another type or a coding, 413 and 408 by the server's limits.
        ClientGone: the client hung up before its end.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise BadRequest(f"expected Content-Type: application/json, got {kind[:80]}", status=415)
    return await read_body(request)


async def read_body(request: Request) -> bytes:
    """The whole body; raises as `read_json` does."""
    if "content-length" not in request.headers and "transfer-encoding" not in request.headers:
        raise BadRequest("expected a body, with Content-Length or in chunks", status=411)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadRequest("expected a body without Content-Encoding", status=415)
    try:
        return await request.body()
    except ClientDisconnect as gone:
        raise ClientGone("the client hung up in mid-body") from gone


def page_of(items: Sequence[JsonObject], request: Request) -> JsonObject:
    """A page of `items` by OpenAI's `order`, `after`, `before` and `limit`; each item has `id` and `created_at`.

    Raises:
        BadRequest: `limit` or `order` out of range; an `after` or `before` that is not in the list.
    """
    query = request.query_params
    limit, order = query.get("limit", str(PAGE_ITEMS)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 5 and 1 <= int(limit) <= PAGE_ITEMS):
        raise unexpected_field(f"a number from 1 to {PAGE_ITEMS}", limit, "limit")
    if order not in ("asc", "desc"):
        raise unexpected_field("asc or desc", order, "order")
    ordered = sorted(items, key=lambda item: (item["created_at"], item["id"]), reverse=order == "desc")
    ids = [item["id"] for item in ordered]
    start, end = 0, len(ordered)
    if "after" in query:
        start = _position(ids, query["after"], "after") + 1
    if "before" in query:
        end = _position(ids, query["before"], "before")
    page = ordered[start:end][: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": end - start > len(page),
    }


def _position(ids: Sequence[str], id: str, param: str) -> int:
    if id not in ids:
        raise BadRequest(f"{param}: {id[:80]!r} is not in this list", param)
    return ids.index(id)
