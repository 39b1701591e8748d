"""When a datagram reached this host, by the kernel's own stamp: how late we read it is our lag, not its sender's."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Sequence

_SO_TIMESTAMPNS = 35  # Linux, all common architectures; Python has no name for it
_TIMESPEC = struct.Struct("@qq")
ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size)
_WAITED_MAX_S = 60.0  # more than that is a wall clock that was set


def stamp_arrivals(datagrams: socket.socket) -> bool:
    """Asks the kernel for stamps; False where it gives none: then nothing is known to have waited."""
    if sys.platform != "linux":
        return False
    try:
        datagrams.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    return True


def waited_s(ancillary: Sequence[tuple[int, int, bytes]], now_ns: int) -> float:
    """How long a datagram had lain in the socket at wall-clock time `now_ns`; 0 when that is not known."""
    for level, kind, stamp in ancillary:
        if (level, kind, len(stamp)) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS, _TIMESPEC.size):
            seconds, nanoseconds = _TIMESPEC.unpack(stamp)
            waited = (now_ns - seconds * 1_000_000_000 - nanoseconds) / 1e9
            return waited if 0 <= waited <= _WAITED_MAX_S else 0.0
    return 0.0
