"""Reads the kernel's time stamp of a datagram: the time it waited in the socket is this node's lag, not its sender's."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Sequence

_SO_TIMESTAMPNS = 35  # Linux, all common architectures; Python has no name for it
_TIMESPEC = struct.Struct("@qq")
ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size)
_MAX_WAITED_S = 60.0  # a longer wait means that the wall clock was set


def stamp_arrivals(datagrams: socket.socket) -> bool:
    """Turns on the kernel's time stamps. Returns False where there are none; then `waited_s` is always 0."""
    if sys.platform != "linux":
        return False
    try:
        datagrams.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True


def waited_s(ancillary: Sequence[tuple[int, int, bytes]], now_ns: int) -> float:
    """Returns how long a datagram had waited in the socket at wall-clock time `now_ns`; 0 when that is not known."""
    for level, kind, stamp in ancillary:
        if (level, kind, len(stamp)) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS, _TIMESPEC.size):
            seconds, nanoseconds = _TIMESPEC.unpack(stamp)
            waited = (now_ns - seconds * 1_000_000_000 - nanoseconds) / 1e9
            return waited if 0 <= waited <= _MAX_WAITED_S else 0.0
    return 0.0
