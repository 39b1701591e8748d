"""Errors on the wire: every failure, in OpenAI's form `{"error": {message, type, param, code}}`.

Pure: an exception and a jitter in, status, headers and body out. The class of an error shows whose
fault it is; a message of our own errors is meant for the client, that of any other exception is not
and never leaves the node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException

from mesh.errors import BadRequest, DeadlineExceeded, ModelLoading, NoPath, PeerLost, Refused
from mesh.json_object import JsonObject

MESSAGE_CHARS = 8192  # an escaped character takes up to 6 bytes: the body stays below 64 KiB
RETRY_AFTER_MAX_S = 60.0
RETRY_AFTER_NO_PATH_S = 2.0  # about what a re-placement takes
RETRY_AFTER_LOADING_S = 1.0  # at least: the time to go is an estimate

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""All other statuses are `invalid_request_error`."""

CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    411: "length_required",
    413: "body_too_large",
    415: "unsupported_media_type",
    417: "expectation_failed",
    429: "rate_limit_exceeded",
    431: "head_too_large",
    500: "internal_error",
    501: "not_implemented",
    503: "overloaded",
    504: "deadline_exceeded",
}
"""The code where the error brings none of its own."""

REASONS = {404: "nothing is served under this path", 405: "this path does not take this method"}


class ClientGone(OSError):
    """The client hung up, or stopped reading for longer than the write deadline: nothing can be sent any more."""


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    status: int
    body: JsonObject
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def encode(self) -> bytes:
        return msgspec.json.encode(self.body)


def answer_of(error: BaseException, jitter: float = 0.0) -> ErrorAnswer:
    """Returns the client's answer for `error`.

    Args:
        error: a group with a single cause counts as that cause.
        jitter: from 0 to 1, drawn anew for each answer, so that clients that were refused together do not return together.
    """
    error = single_cause(error)
    if isinstance(error, HTTPException):
        headers = tuple((name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items())
        return _answer(error.status_code, REASONS.get(error.status_code, error.detail), headers=headers)
    if isinstance(error, BadRequest):
        headers = ((b"www-authenticate", b"Bearer"),) if error.status == 401 else ()
        return _answer(error.status, str(error), error.param, error.code, headers)
    if isinstance(error, Refused):
        status = 429 if error.quota else 503
        return _answer(status, str(error), headers=retry_headers(error.retry_after_s, jitter))
    if isinstance(error, ModelLoading):
        headers = retry_headers(max(error.eta_s, RETRY_AFTER_LOADING_S), jitter)
        fields = loading_fields(error.gaps, error.progress, error.eta_s)
        return _answer(503, str(error), code="model_loading", headers=headers, **fields)
    if isinstance(error, NoPath):
        return _answer(503, str(error), code="no_path", headers=retry_headers(RETRY_AFTER_NO_PATH_S, jitter))
    if isinstance(error, PeerLost):
        return _answer(503, str(error), code="peer_lost", headers=retry_headers(RETRY_AFTER_NO_PATH_S, jitter))
    if isinstance(error, DeadlineExceeded):
        return _answer(504, str(error) or "the request's deadline passed")
    return _answer(500, "the node failed at this request; its log has the reason under the request's id")


def single_cause(error: BaseException) -> BaseException:
    """The one error inside nested groups that nurseries made; the group itself where there are several of them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def is_expected(error: BaseException) -> bool:
    """Whether `error` is a refusal on purpose, not a failure of ours."""
    return isinstance(error, (BadRequest, Refused, NoPath, PeerLost, DeadlineExceeded, HTTPException))


def retry_headers(retry_after_s: float, jitter: float) -> tuple[tuple[bytes, bytes], ...]:
    """`Retry-After` (whole seconds, rounded up) and `retry-after-ms`, up to half again as long, 60 s at most."""
    wait_s = min(max(retry_after_s, 0.05) * (1 + jitter / 4), RETRY_AFTER_MAX_S)
    return ((b"retry-after", b"%d" % math.ceil(wait_s)), (b"retry-after-ms", b"%d" % round(wait_s * 1000)))


def loading_fields(layers: Iterable[tuple[int, int]], progress: float, eta_s: float) -> JsonObject:
    """The fields of an error `model_loading` beside its message: `layers` are `[start, end)`, `progress` is 0 to 1."""
    return {"progress": round(progress, 2), "layers": [list(run) for run in layers], "eta_s": round(eta_s, 1)}


def _answer(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    **more: object,
) -> ErrorAnswer:
    """`more`: further fields of the error object."""
    if len(message) > MESSAGE_CHARS:
        message = message[:MESSAGE_CHARS] + "…"
    param = param if param is None else param[:256]
    fields = {
        "message": message,
        "type": TYPES.get(status, "invalid_request_error"),
        "param": param,
        "code": code or CODES.get(status),
        **more,
    }
    return ErrorAnswer(status, {"error": fields}, headers)


def unexpected_field(expected: str, got: object, param: str) -> BadRequest:
    """A 400 with what was expected, what came, and in which field."""
    shown = repr(got)
    return BadRequest(f"{param}: expected {expected}, got {shown if len(shown) <= 80 else shown[:80] + '…'}", param)
