"""Encodes an error that answers a call as a map in the reply's header, and decodes it to the same error."""

from __future__ import annotations

import math

from mesh.errors import BadRequest, DeadlineExceeded, MeshError, Refused, RemoteError

MAX_MESSAGE_CHARS = 2000  # of an error in a reply: some messages quote the caller's input, which may be large
MAX_RETRY_AFTER_S = 3600.0


def error_to_header(error: Exception) -> dict[str, object]:
    """Returns the map of an error: its type, its message and the fields that the caller needs to raise it again."""
    header: dict[str, object] = {"type": type(error).__name__, "message": str(error)[:MAX_MESSAGE_CHARS]}
    if isinstance(error, Refused):
        header |= {"retry_after_s": error.retry_after_s, "quota": error.quota}
    elif isinstance(error, BadRequest):
        header |= {"param": error.param, "code": error.code, "status": error.status}
    return header


def error_from_header(peer: str, header: object) -> MeshError:
    """Returns the error of a map that `peer` sent. Fields of a wrong type get their defaults; the peer is not trusted."""
    if not isinstance(header, dict):
        return RemoteError(peer, "answered with a malformed error")
    message = str(header.get("message", ""))[:MAX_MESSAGE_CHARS]
    match header.get("type"):
        case "Refused":
            return Refused(message, _seconds(header.get("retry_after_s")), quota=header.get("quota") is True)
        case "BadRequest":
            param, code, status = header.get("param"), header.get("code"), header.get("status")
            return BadRequest(
                message,
                param if isinstance(param, str) else None,
                code if isinstance(code, str) else None,
                status if isinstance(status, int) and 400 <= status < 500 else 400,
            )
        case "DeadlineExceeded":
            return DeadlineExceeded(message)
        case kind:
            return RemoteError(peer, f"{str(kind)[:100]}: {message}")


def _seconds(received: object) -> float:
    """Returns a peer's `retry_after_s` within 0 and `MAX_RETRY_AFTER_S`; 1 s where it is not a number."""
    if not isinstance(received, int | float) or math.isnan(received):
        return 1.0
    return float(min(max(received, 0.0), MAX_RETRY_AFTER_S))
