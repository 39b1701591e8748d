"""Ranks as threads of the test's own process: all of a rank but the process, for a tenth of the time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.parallel.messages import Channel, LoadShard, ShardLoaded
from node.engine.parallel.rank import serve
from node.engine.parallel.stage import ParallelStage

TIMEOUT_S = 20.0


class ThreadWorkerGroup:
    """Stands for `Crew`. Ranks load one after the other, for transformers' loader sets a default of the whole process."""

    processes = ()

    def __init__(self, ranks: int) -> None:
        pairs = [socket.socketpair() for _ in range(ranks)]
        self.sockets = [end for pair in pairs for end in pair]
        self._channels = [Channel(ours) for ours, _ in pairs]
        self._loaded: list[Any] = []
        self.said: list[msgspec.Struct] = []
        self.threads = [threading.Thread(target=self._serve, args=(Channel(theirs),)) for _, theirs in pairs]
        for thread in self.threads:
            thread.start()

    def _serve(self, channel: Channel) -> None:
        try:
            serve(channel)
        except (EOFError, OSError):
            pass
        finally:
            channel.socket.close()

    def send_to_each(self, messages: Sequence[msgspec.Struct], timeout_s: float) -> None:
        for channel, message in zip(self._channels, messages):
            channel.send(message)
            if isinstance(message, LoadShard):
                self._loaded.append(channel.receive(ShardLoaded, time.monotonic() + TIMEOUT_S))

    def send_to_all(self, message: msgspec.Struct, timeout_s: float) -> None:
        self.said.append(message)
        self.send_to_each([message] * len(self._channels), timeout_s)

    def receive_from_all(self, kind: Any, timeout_s: float) -> list[Any]:
        if kind is ShardLoaded:
            return self._loaded
        return [channel.receive(kind, time.monotonic() + TIMEOUT_S) for channel in self._channels]

    def on_end(self, call: Callable[[str], None]) -> None: ...

    def end(self, reason: str = "") -> None:
        for channel in self._channels:
            channel.socket.close()
        for thread in self.threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def parallel(directory: Path, ranks: int, kernel: str, start: int = 0, end: int = 4) -> ParallelStage:
    """A stage of `ranks` threads, loaded. The caller closes it."""
    checkpoint = read_checkpoint(directory)
    stage = ParallelStage(checkpoint, start, end, KERNELS[kernel], 1, ranks, start_workers=ThreadWorkerGroup)  # type: ignore[arg-type]
    stage.pack()
    return stage
