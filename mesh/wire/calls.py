"""The types of a call between two nodes, independent of the transport (`mesh.links.links`).

A frame is a kind, a MessagePack header and a raw tail (tensors and files, which are never in the header).
Cores and services get these callables as arguments, so that tests can give them another network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from mesh.errors import BadRequest, DeadlineExceeded, PeerLost, Refused, RemoteError
from mesh.ids import Address, NodeId

CALL_FAILURES = (PeerLost, DeadlineExceeded, RemoteError, Refused, BadRequest)
"""All errors that a peer call raises: the link or the peer failed, time ran out, or the peer answered with an error."""

Header = Mapping[str, object]
"""Plain MessagePack values by name, as they arrived: a receiver checks each, or decodes all with a struct."""

CallReply = tuple[Header, bytes]

Handler = Callable[[NodeId, Header, bytes], Awaitable[CallReply]]
"""Answers one call of `sender`. Its `Refused`, `BadRequest` or `RemoteError` is raised at the caller as the same error."""

Receiver = Callable[[NodeId, Header, bytes], None]
"""Receives one one-way frame; runs in the link's reader, so it must not block."""


class Call(Protocol):
    """Calls a peer and waits for its answer.

    Raises `CALL_FAILURES`:
        PeerLost: the link broke or could not be made before the answer was received.
        DeadlineExceeded: `timeout_s` passed first.
        Refused, BadRequest, RemoteError: the peer answered with this error.
    """

    async def __call__(
        self, to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0
    ) -> CallReply: ...


class Post(Protocol):
    """Sends a one-way frame through a bounded outbox; frames to one peer keep their order.

    Raises:
        PeerLost: there is no link and none could be made, or the outbox is full (the peer does not read).
    """

    def __call__(self, to: Address, kind: str, header: Header, tail: bytes = b"") -> None: ...


Handlers = Mapping[str, Handler]
Receivers = Mapping[str, Receiver]
