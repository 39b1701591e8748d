"""The errors of the mesh: each class says whose fault it is and what it leaves behind.

A message says what was expected, what came and what to do.
"""

from __future__ import annotations


class MeshError(Exception):
    """Base of all errors the mesh raises on purpose."""


class LocalError(MeshError):
    """We misused one of our own interfaces: a bug. Not to be caught; state may be inconsistent."""


class RemoteError(MeshError):
    """A peer broke the protocol, or answered that it failed. Our own state is unchanged."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"peer {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class PeerLost(MeshError):
    """The link to a peer broke, or the member went down, in mid-call: whether the call took effect is unknown."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"lost peer {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class PeerRefused(PeerLost):
    """Who answers at the address will not link with us (another key or mesh), or is no mesh node: somebody must mend that."""


class DeadlineExceeded(MeshError):
    """The request's own deadline passed (HTTP 504). Its work is freed."""


class Refused(MeshError):
    """Admission said no, before any work was done: try again after `retry_after_s` (HTTP 429 or 503)."""

    def __init__(self, message: str, retry_after_s: float = 1.0, *, quota: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.quota = quota  # the client's own limit (429), not the mesh's (503)


class NoPath(MeshError):
    """No live peers cover all layers of the model (HTTP 503). The message names the gap."""

    def __init__(self, model: str, gaps: tuple[tuple[int, int], ...]) -> None:
        spans = ", ".join(f"{start}:{end}" for start, end in gaps) or "any layer"
        first = f"{gaps[0][0]}:{gaps[0][1]}" if gaps else "auto"
        super().__init__(
            f"no live peer holds layers {spans} of {model}; start one with: mesh up --join HOST:PORT --layers {first}"
        )
        self.model = model
        self.gaps = gaps


class BadRequest(MeshError):
    """The client erred (HTTP 4xx): `param` names the field. Nothing was done."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
