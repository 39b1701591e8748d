"""What a node and its worker processes say to each other: length-prefixed MessagePack over a socket pair.

The node says the same to every rank, in the same order; a rank that is asked for something answers once. What changes what
a rank keeps (`Change`) rides with the next step, in the order in which it came about.
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
    """The first message to a rank: load your part of the span."""

    directory: str
    start: int
    end: int
    kernel: str
    threads: int
    rank: int
    ranks: int
    device: str
    meeting: str  # the file through which ranks find each other
    timeout_s: float  # of everything that ranks do together


class ShardLoaded(msgspec.Struct, frozen=True):
    """The answer to `LoadShard`. `refused`: why this kernel will not do; `unservable`: nor will another one."""

    parameters: int = 0
    buckets: tuple[int, ...] = ()
    refused: str = ""
    unservable: bool = False


class JoinGroup(msgspec.Struct, frozen=True):
    """To all, once all are loaded: meet, and pad rows to these counts."""

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
    """Begin a sequence with what these pages hold."""

    sequence: int
    pages: tuple[int, ...]


class ForgetNumber(msgspec.Struct, frozen=True, tag="Forget"):
    """Drop a sequence, or a page; one that was never heard of is fine."""

    number: int
    page: bool = False


Change = KeepPage | RestoreSequence | ForgetNumber


class SegmentRows(msgspec.Struct, frozen=True, array_like=True):
    """`Segment`, with the sequence by its number."""

    row: int
    count: int
    position: int
    sequence: int


class ForwardStep(msgspec.Struct, frozen=True):
    """`Stage.forward`. `hidden`: the bytes of `[rows, hidden_size]` in the kernel's dtype; None: `ids` are given."""

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

    `windows`: from the first rank, those through which attention was asked to look so far.
    """

    number: int
    data: bytes
    windows: tuple[int, ...] = ()


class Channel:
    """One end. A read or write that is not over by the deadline raises TimeoutError, as a socket does."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: msgspec.Struct, deadline_s: float | None = None) -> None:
        self.send_bytes(encoded(message), deadline_s)

    def send_bytes(self, framed: bytes, deadline_s: float | None = None) -> None:
        """`framed`: from `encoded`, which many channels may share."""
        view = memoryview(framed)
        while view:
            self._arm(deadline_s)
            view = view[self.socket.send(view) :]

    def receive(self, kind: type[M], deadline_s: float | None = None) -> M:
        """The next message.

        Raises:
            EOFError: the other side is gone.
            msgspec.ValidationError: it is another message.
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
        """`deadline_s`: by the monotonic clock."""
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the deadline has passed")
            self.socket.settimeout(left_s)


def encoded(message: msgspec.Struct) -> bytes:
    """A message as it goes over a channel."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body
