"""Frames over a trio stream: the thin shell around `mesh.wire.frames`."""

from __future__ import annotations

import ssl

import trio

from mesh.wire.frames import MAX_HEADER_BYTES, MAX_TAIL_BYTES, Frame, FrameError, FrameReader

RECEIVE_BYTES = 256 << 10
COALESCE_BYTES = 256 << 10  # one send for many small frames
MAX_HELLO_BYTES = 4 << 10  # what a stranger may make us keep before its greeting was read

CLOSED = "closed by the peer"


class FrameSource:
    """Frames of one stream, one by one. How it ended is kept, not raised: an end is what every link comes to.

    Until `greeted` only a small frame without a tail is taken.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._reader = FrameReader(MAX_HELLO_BYTES, 0)
        self._ready: list[Frame] = []
        self.end_reason = ""
        self.broke_the_protocol = False

    def greeted(self) -> None:
        """The other side is authenticated: from here on it may send frames of full size."""
        self._reader.allow(MAX_HEADER_BYTES, MAX_TAIL_BYTES)

    async def next(self) -> Frame | None:
        """The next frame; None once the stream has ended, orderly or suddenly: then `end_reason` says how."""
        while not self._ready:
            try:
                data = await self._stream.receive_some(RECEIVE_BYTES)
                self._ready = self._reader.feed(bytes(data))[::-1]
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.end_reason = _broken_reason(error)
                return None
            except FrameError as error:
                self.end_reason, self.broke_the_protocol = f"not a mesh node: {error}", True
                return None
            if not data:
                self.end_reason = CLOSED
                return None
        return self._ready.pop()


async def send(connection: trio.abc.Stream, data: bytes) -> bool:
    """Sends; False when the stream is broken; the reading side learns why."""
    try:
        await connection.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return False
    return True


def _broken_reason(error: BaseException) -> str:
    if isinstance(error.__cause__, ssl.SSLEOFError):
        return CLOSED
    if isinstance(error.__cause__, ssl.SSLError):
        return "TLS handshake failed: the peer has another mesh key, or is no mesh node"
    return "connection broken"
