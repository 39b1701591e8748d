"""What membership received of late, written beside the node's data when it is asked for by SIGUSR1, and when the node ends.

`mesh simulate --replay FILE` leads the same core through it again.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import structlog
import trio

from mesh.files import replace_file

FILE_NAME = "membership.trace"

log = structlog.get_logger()


class TraceFile:
    """`dump`: the trace as of now; None: none is kept."""

    def __init__(self, directory: Path, dump: Callable[[], bytes | None]) -> None:
        self._path = directory / FILE_NAME
        self._dump = dump

    async def run(self) -> None:
        """Writes at each SIGUSR1, until cancelled."""
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            async for _ in signals:
                if not await self.write():
                    log.warning("membership.trace_not_kept", why="this node was started without --trace-mb")

    async def write(self) -> bool:
        """Replaces the file atomically, readable by its owner only. A write error is logged. False: there is no trace."""
        if (raw := self._dump()) is None:
            return False
        try:
            await trio.to_thread.run_sync(replace_file, self._path, raw)
        except OSError as error:
            log.warning("membership.trace_not_written", path=str(self._path), why=str(error))
        else:
            log.info("membership.trace_written", path=str(self._path), size_bytes=len(raw))
        return True
