"""How an error that answers a call travels: as a map in the reply's header, and back as the same error."""

from __future__ import annotations

import math

from mesh.errors import BadRequest, DeadlineExceeded, MeshError, Refused, RemoteError

MAX_MESSAGE_CHARS = 2000  # of an error that travels: some quote what the caller sent, which may be large
MAX_RETRY_AFTER_S = 3600.0


def error_to_header(error: Exception) -> dict[str, object]:
    header: dict[str, object] = {"type": type(error).__name__, "message": str(error)[:MAX_MESSAGE_CHARS]}
    if isinstance(error, Refused):
        header |= {"retry_after_s": error.retry_after_s, "quota": error.quota}
    elif isinstance(error, BadRequest):
        header |= {"param": error.param, "code": error.code, "status": error.status}
    return header


def error_from_header(peer: str, header: object) -> MeshError:
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


def _seconds(told: object) -> float:
    """A wait as a peer told it: a number that clocks can be set by, whatever came."""
    if not isinstance(told, int | float) or math.isnan(told):
        return 1.0
    return float(min(max(told, 0.0), MAX_RETRY_AFTER_S))
