"""The errors of the mesh: each class stands for whose fault it is and which state it leaves.

A message states what was expected, what was received and what to do.
"""

from __future__ import annotations

Layers = tuple[tuple[int, int], ...]  # runs of layers `[start, end)`


class MeshError(Exception):
    """Base of all errors that the mesh raises on purpose."""


class LocalError(MeshError):
    """The program misused one of its own interfaces: a bug. It must not be caught; state may be inconsistent."""


class RemoteError(MeshError):
    """A peer broke the protocol, or answered that it failed. This node's state is unchanged."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"peer {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class PeerLost(MeshError):
    """The link to a peer broke, or the member went down, during a call: whether the call took effect is unknown."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"lost peer {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class PeerRefused(PeerLost):
    """The node at the address refuses the link (another key or mesh), or is not a mesh node: an operator must correct this."""


class DeadlineExceeded(MeshError):
    """The request's own deadline passed (HTTP 504). Its work is freed."""


class Refused(MeshError):
    """Admission refused the request before any work was done: try again after `retry_after_s` (HTTP 429 or 503)."""

    def __init__(self, message: str, retry_after_s: float = 1.0, *, quota: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.quota = quota  # the client's own limit (429), not the mesh's (503)


class NoPath(MeshError):
    """No live peers cover all layers of the model (HTTP 503). The message names the gap."""

    def __init__(self, model: str, gaps: Layers, loading: Layers = ()) -> None:
        """`gaps`: layers that no live peer holds or loads; `loading`: missing layers that are being loaded."""
        what, first = (f"layers {_spans(gaps)}", f"{gaps[0][0]}:{gaps[0][1]}") if gaps else ("any layer", "auto")
        super().__init__(
            f"no live peer holds {what} of {model}; "
            f"start one with: mesh up --join HOST:PORT --model {model} --layers {first}"
            + (f" (layers {_spans(loading)} are being loaded)" if loading else "")
        )
        self.model = model
        self.gaps = gaps


class ModelLoading(NoPath):
    """The model cannot answer yet but is being loaded (HTTP 503): the client waits and tries again."""

    def __init__(self, model: str, gaps: Layers, progress: float, eta_s: float, nodes: tuple[str, ...]) -> None:
        """`gaps`: layers that `nodes`, listed by name, are loading; empty: the entry is fetching the tokenizer from `nodes`.

        `progress`: 0 to 1; `eta_s`: estimated time left.
        """
        super().__init__(model, gaps)
        by, of = (f" {word} {', '.join(nodes)}" if nodes else "" for word in ("by", "from"))
        what = f"layers {_spans(gaps)} of {model} are being loaded{by}" if gaps else f"{model}'s tokenizer is being fetched{of}"
        self.args = (f"{what}: {progress:.0%} done, about {eta_s:.0f} s to go",)
        self.progress = progress
        self.eta_s = eta_s


class BadRequest(MeshError):
    """The client erred (HTTP 4xx): `param` names the field. Nothing was done."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def _spans(layers: Layers) -> str:
    return ", ".join(f"{start}:{end}" for start, end in layers)
