"""The messages between a node and its worker processes: length-prefixed MessagePack over a socket pair.

The node sends every rank the same requests in the same order; a rank answers each once. Changes of the sequences and pages
that a rank stores (`Change`) are sent with the next step, in the order in which they were made.
"""

from __future__ import annotations

import socket
import time
from typing import TypeVar

import msgspec

LENGTH_BYTES = 8
MAX_BYTES = 1 << 30  # of one message; a step of 8,192 rows of 16,384 float32 activations is half of that

M = TypeVar("M", bound=msgspec.Struct)


class LoadShard(msgspec.Struct, frozen=True):
    """The first message to a rank: load this part of the span."""

    directory: str
    start: int
    end: int
    kernel: str
    threads: int
    rank: int
    ranks: int
    device: str
    meeting: str  # the store file by which the ranks connect to each other
    timeout_s: float  # of each operation that the ranks do together


class ShardLoaded(msgspec.Struct, frozen=True):
    """The answer to `LoadShard`. `refused`: why this kernel cannot be used; `unservable`: no other can be used either."""

    parameters: int = 0
    buckets: tuple[int, ...] = ()
    refused: str = ""
    unservable: bool = False


class JoinGroup(msgspec.Struct, frozen=True):
    """To all ranks, after all have loaded: connect to each other, and pad rows to these counts."""

    buckets: tuple[int, ...]


class GroupJoined(msgspec.Struct, frozen=True):
    """The answer to `JoinGroup`: the ranks are connected."""


class KeepPage(msgspec.Struct, frozen=True, tag="Keep"):
    """Copy a sequence's positions `position … position + count - 1` in the layers `[start, end)`."""

    page: int
    sequence: int
    position: int
    count: int
    start: int
    end: int


class RestoreSequence(msgspec.Struct, frozen=True, tag="Restore"):
    """Begin a sequence with the contents of these pages."""

    sequence: int
    pages: tuple[int, ...]


class ForgetNumber(msgspec.Struct, frozen=True, tag="Forget"):
    """Drop a sequence or a page, if the rank has it."""

    number: int
    page: bool = False


Change = KeepPage | RestoreSequence | ForgetNumber


class SegmentRows(msgspec.Struct, frozen=True, array_like=True):
    """A `Segment` whose sequence is given by its number."""

    row: int
    count: int
    position: int
    sequence: int


class ForwardStep(msgspec.Struct, frozen=True):
    """A call of `Stage.forward`. `hidden`: the bytes of `[rows, hidden_size]` in the kernel's dtype; None: `ids` are given."""

    number: int
    changes: tuple[Change, ...]
    start: int
    end: int
    segments: tuple[SegmentRows, ...]
    positions: tuple[int, ...]
    ids: tuple[int, ...] | None
    hidden: bytes | None
    logits_at: tuple[int, ...]


class ForwardDone(msgspec.Struct, frozen=True):
    """The answer to `ForwardStep`: the rank's columns of the logits, float32; or, from the first rank alone, the activations.

    `windows`: from the first rank, the sliding windows that attention has used so far.
    """

    number: int
    data: bytes
    windows: tuple[int, ...] = ()


class Channel:
    """One end of a socket pair. A read or write that has not ended by its deadline raises TimeoutError."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: msgspec.Struct, deadline_s: float | None = None) -> None:
        """Sends one message. `deadline_s`: by the monotonic clock; None: waits without limit."""
        self.send_bytes(encoded(message), deadline_s)

    def send_bytes(self, framed: bytes, deadline_s: float | None = None) -> None:
        """Sends one message that `encoded` returned; several channels may send the same bytes."""
        view = memoryview(framed)
        while view:
            self._arm(deadline_s)
            view = view[self.socket.send(view) :]

    def receive(self, kind: type[M], deadline_s: float | None = None) -> M:
        """Receives the next message.

        Raises:
            EOFError: the other side has closed its end.
            msgspec.ValidationError: the message is of another kind, or too long.
        """
        size = int.from_bytes(self._exactly(LENGTH_BYTES, deadline_s), "little")
        if size > MAX_BYTES:
            raise msgspec.ValidationError(f"expected at most {MAX_BYTES} bytes, got {size}")
        return msgspec.msgpack.decode(self._exactly(size, deadline_s), type=kind)

    def _exactly(self, size: int, deadline_s: float | None) -> bytearray:
        read = bytearray(size)
        view = memoryview(read)
        while view:
            self._arm(deadline_s)
            count = self.socket.recv_into(view)
            if not count:
                raise EOFError("the other side is gone")
            view = view[count:]
        return read

    def _arm(self, deadline_s: float | None) -> None:
        """Sets the socket's timeout to the time left until `deadline_s`, by the monotonic clock."""
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the deadline has passed")
            self.socket.settimeout(left_s)


def encoded(message: msgspec.Struct) -> bytes:
    """Returns a message with its length before it, as a channel sends it."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body
