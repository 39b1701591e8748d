"""How an error that answers a call travels: as a map in the reply's header, and back as the same error."""

from __future__ import annotations

from typing import Any

from mesh.calls import Header
from mesh.errors import BadRequest, DeadlineExceeded, MeshError, Refused, RemoteError


def error_to_header(error: Exception) -> Header:
    header: Header = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, Refused):
        header |= {"retry_after_s": error.retry_after_s, "quota": error.quota}
    elif isinstance(error, BadRequest):
        header |= {"param": error.param, "code": error.code, "status": error.status}
    return header


def error_from_header(peer: str, header: Any) -> MeshError:
    if not isinstance(header, dict):
        return RemoteError(peer, "answered with a malformed error")
    message = str(header.get("message", ""))
    match header.get("type"):
        case "Refused":
            retry_after_s = header.get("retry_after_s")
            return Refused(message, float(retry_after_s) if isinstance(retry_after_s, int | float) else 1.0)
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
            return RemoteError(peer, f"{kind}: {message}")
