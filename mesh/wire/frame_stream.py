"""Reads and sends frames over a trio stream: the shell around `mesh.wire.frames`."""

from __future__ import annotations

import ssl

import trio

from mesh.wire.frames import MAX_HEADER_BYTES, MAX_TAIL_BYTES, Frame, FrameError, FrameReader

RECEIVE_BYTES = 256 << 10
COALESCE_BYTES = 256 << 10  # one send for many small frames
MAX_HELLO_BYTES = 4 << 10  # of a frame's header before the peer is authenticated

CLOSED = "closed by the peer"


class FrameSource:
    """Reads the frames of one stream. The end of the stream is no exception: `end_reason` keeps its reason.

    Until `greeted` is called, only small frames without a tail are accepted.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._reader = FrameReader(MAX_HELLO_BYTES, 0)
        self._ready: list[Frame] = []
        self.end_reason = ""
        self.broke_the_protocol = False

    def greeted(self) -> None:
        """Accepts frames of full size from now on: the peer is authenticated."""
        self._reader.allow(MAX_HEADER_BYTES, MAX_TAIL_BYTES)

    async def next(self) -> Frame | None:
        """Returns the next frame; None when the stream has ended, closed or broken, with the reason in `end_reason`."""
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
    """Sends `data`. Returns False when the stream is broken; its reader gets the reason."""
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
