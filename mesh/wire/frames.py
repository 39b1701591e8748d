"""Encodes and decodes the frames between two nodes on one stream, without I/O: bytes in, frames out.

Layout, big-endian: u32 header bytes, u32 tail bytes, header, tail. The header is a MessagePack map
`{"k": kind, "n": call number, "r": reply?, "h": header, "l": sender's load (mesh.wire.load)}`; the tail is raw
(tensors, files).
Both lengths are checked as soon as they are received, and memory grows with the bytes received, not with the lengths announced.
A hostile peer can occupy the memory of one frame of the largest size for each of its links; before its greeting is read, 4 KiB
and one read of the socket (`mesh.wire.frame_stream`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgpack

from mesh.view import Load
from mesh.wire.calls import Header
from mesh.wire.load import pack_load, unpack_load

MAX_HEADER_BYTES = 4 << 20
MAX_TAIL_BYTES = 256 << 20  # a 4,096-token chunk of a 16,384-wide fp32 model
_LENGTHS = struct.Struct(">II")
_HTTP = b"HTTP"  # the first bytes of an HTTP server's answer; read as a length they are over the limit
_MAX_ITEMS = 1 << 20
_MAX_STRING_BYTES = 1 << 20


class FrameError(Exception):
    """The bytes are not a frame: the rest of the stream cannot be decoded and it must be closed."""


@dataclass(frozen=True, slots=True)
class Frame:
    """`number` pairs a call (> 0) with its reply; 0 is a one-way frame."""

    kind: str
    header: Header
    tail: bytes = b""
    number: int = 0
    is_reply: bool = False
    load: Load | None = None  # the sender's, when the frame was sent


def encode(frame: Frame) -> bytes:
    """Encodes a frame.

    Raises:
        ValueError: the frame is over the limits that `FrameReader` enforces.
    """
    load = pack_load(frame.load) if frame.load is not None else None
    head = msgpack.packb({"k": frame.kind, "n": frame.number, "r": frame.is_reply, "h": frame.header, "l": load})
    if len(head) > MAX_HEADER_BYTES or len(frame.tail) > MAX_TAIL_BYTES:
        raise ValueError(f"frame {frame.kind} too large: header {len(head)}, tail {len(frame.tail)} bytes")
    return b"".join((_LENGTHS.pack(len(head), len(frame.tail)), head, frame.tail))


class FrameReader:
    """Splits a byte stream into frames."""

    def __init__(self, max_header_bytes: int = MAX_HEADER_BYTES, max_tail_bytes: int = MAX_TAIL_BYTES) -> None:
        self._buffer = bytearray()
        self._max_header_bytes = max_header_bytes
        self._max_tail_bytes = max_tail_bytes

    def allow(self, max_header_bytes: int, max_tail_bytes: int) -> None:
        """Sets the limits of the frames that follow."""
        self._max_header_bytes, self._max_tail_bytes = max_header_bytes, max_tail_bytes

    def feed(self, data: bytes) -> list[Frame]:
        """Adds `data` and returns all frames that are complete with it.

        Raises:
            FrameError: over a limit, or not a frame; the reader cannot be used any more.
        """
        self._buffer += data
        frames = []
        while len(self._buffer) >= _LENGTHS.size:
            header_bytes, tail_bytes = _LENGTHS.unpack_from(self._buffer)
            if bytes(self._buffer[: len(_HTTP)]) == _HTTP:
                raise FrameError("an HTTP server answers there; give the node's gossip address (mesh nodes shows it)")
            if header_bytes > self._max_header_bytes or tail_bytes > self._max_tail_bytes:
                raise FrameError(f"frame of {header_bytes} + {tail_bytes} bytes is over the limit")
            end = _LENGTHS.size + header_bytes + tail_bytes
            if len(self._buffer) < end:
                break
            head = bytes(self._buffer[_LENGTHS.size : _LENGTHS.size + header_bytes])
            tail = bytes(self._buffer[_LENGTHS.size + header_bytes : end])
            del self._buffer[:end]
            frames.append(_decode(head, tail))
        return frames


def _decode(head: bytes, tail: bytes) -> Frame:
    try:
        outer = msgpack.unpackb(
            head,
            strict_map_key=True,
            max_ext_len=0,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_str_len=_MAX_STRING_BYTES,
            max_bin_len=len(head),
        )
        kind, number, is_reply, header = outer["k"], outer["n"], outer["r"], outer["h"]
        load = None if outer["l"] is None else unpack_load(outer["l"])[0]
    except (ValueError, KeyError, TypeError, struct.error, msgpack.UnpackException) as error:
        raise FrameError(f"not a frame header: {type(error).__name__}") from error
    if not (isinstance(kind, str) and type(number) is int and type(is_reply) is bool and isinstance(header, dict)):
        raise FrameError("a frame header field has the wrong type")
    return Frame(kind, header, tail, number, is_reply, load)
