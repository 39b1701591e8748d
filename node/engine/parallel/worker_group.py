"""The worker processes of a span, seen from the node: starts them, exchanges messages, and ends all when one ends.

Ranks compute in lockstep, so when one ends, fails or is late the others cannot continue: all are killed, and the caller
drops the span. A thread notices the end of a rank also between requests. Workers hold no state worth saving, so they are
ended by SIGKILL; when the node itself ends, they exit with it (`node.host.parent_watch`).
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from mesh.errors import MeshError
from node.engine.parallel.messages import Channel, encoded

ROOT = Path(__file__).resolve().parents[3]  # where the packages are
MODULE = "node.engine.parallel"
EXIT_WAIT_S = 1.0  # how long to wait for the exit code of a worker that has closed its socket

log = structlog.get_logger()

M = TypeVar("M", bound=msgspec.Struct)
T = TypeVar("T")


class WorkersLost(MeshError):
    """The workers of a span have ended, and their sequences are lost. Load the span again."""


class WorkerGroup:
    """`ranks` worker processes. One thread at a time may send and receive; any thread may call the other methods."""

    def __init__(self, ranks: int) -> None:
        self._parent_read, self._parent_write = os.pipe()  # not inheritable but by `pass_fds`
        self._lock = threading.Lock()
        self._ended: str | None = None  # the reason, once ended
        self._over = threading.Event()  # set when all have ended and the callback has run
        self._on_end: Callable[[str], None] | None = None
        self._channels: list[Channel] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = weakref.finalize(self, _close, self._channels)
        try:
            for _ in range(ranks):
                self._start()
        except OSError as error:
            self.end(f"no worker could be started: {error}")
            raise WorkersLost(self._ended) from None
        self._watcher = threading.Thread(target=self._watch, name="tensor-parallel watcher", daemon=True)
        self._watcher.start()

    @property
    def processes(self) -> tuple[int, ...]:
        """The workers' process ids, by rank."""
        return tuple(process.pid for process in self._processes)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", MODULE, str(theirs.fileno()), str(self._parent_read)]
        with theirs:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._parent_read),
            )
        self._channels.append(Channel(ours))
        self._processes.append(process)

    def send_to_each(self, messages: Sequence[msgspec.Struct], timeout_s: float) -> None:
        """Sends each rank its own message.

        Raises:
            WorkersLost: a worker has ended, or did not receive in time.
        """
        assert len(messages) == len(self._channels), "one message for each rank"
        self._send([encoded(message) for message in messages], timeout_s)

    def send_to_all(self, message: msgspec.Struct, timeout_s: float) -> None:
        """Sends all ranks the same message; raises as `send_to_each`."""
        self._send([encoded(message)] * len(self._channels), timeout_s)

    def _send(self, framed: Sequence[bytes], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        for rank, message in enumerate(framed):
            self._exchange(rank, partial(Channel.send_bytes, framed=message, deadline_s=deadline_s))

    def receive_from_all(self, kind: type[M], timeout_s: float) -> list[M]:
        """Receives one answer of each rank, by rank.

        Raises:
            WorkersLost: a worker has ended, did not answer in time, or sent another message.
        """
        deadline_s = time.monotonic() + timeout_s
        return [self._exchange(rank, lambda channel: channel.receive(kind, deadline_s)) for rank in range(len(self._channels))]

    def _exchange(self, rank: int, operation: Callable[[Channel], T]) -> T:
        """Returns the result of an operation on a rank's channel; an error ends all workers and raises WorkersLost."""
        try:
            return operation(self._channels[rank])
        except TimeoutError:
            reason = f"rank {rank} did not answer in time"
        except msgspec.MsgspecError as error:
            reason = f"rank {rank} answered something else: {error}"
        except (EOFError, OSError):
            reason = self._reason_of_end(rank)
        self.end(reason)
        raise WorkersLost(f"the span's workers were ended: {self._ended}")

    def _reason_of_end(self, rank: int) -> str:
        """Returns why the workers ended; `rank`: the first whose socket was seen closed."""
        deadline_s = time.monotonic() + EXIT_WAIT_S
        for process in (self._processes[rank], *self._processes):  # a socket closes a moment before its process ends
            try:
                if process.wait(max(0.0, deadline_s - time.monotonic())) < 0:
                    break  # killed by a signal: the cause of the others' end
            except subprocess.TimeoutExpired:
                break
        return cause_of_end(rank, [process.poll() for process in self._processes])

    # ---- the end

    def on_end(self, call: Callable[[str], None]) -> None:
        """Calls `call` once with the reason, from any thread, when the workers end before `end`; now, if they already have."""
        with self._lock:
            if self._ended is None:
                self._on_end = call
                return
        call(self._ended)

    def end(self, reason: str = "") -> None:
        """Kills all workers and waits for their end. `reason`: why, where the caller did not want it; it reaches `on_end`."""
        with self._lock:
            first = self._ended is None
            if first:
                self._ended = reason or "they were told to end"
            call, self._on_end = self._on_end if reason else None, None
        if not first:
            self._over.wait()
            return
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        os.close(self._parent_read)
        os.close(self._parent_write)
        if reason:
            log.error("workers.lost", reason=reason)
        if call is not None:
            call(reason)
        self._over.set()

    def _watch(self) -> None:
        """Waits until a worker's socket closes, which happens whenever its process ends, then ends all workers."""
        poll = select.poll()
        for channel in self._channels:
            poll.register(channel.socket, 0)  # POLLHUP is always reported
        numbers = {channel.socket.fileno(): rank for rank, channel in enumerate(self._channels)}
        self.end(self._reason_of_end(numbers[poll.poll()[0][0]]))


def cause_of_end(rank: int, codes: Sequence[int | None]) -> str:
    """Returns why a group of workers ended, by their exit codes (None: it still runs). `rank`: the first that was noticed.

    When a worker is killed, the all-reduce of the others fails, and one of those may be noticed first.
    """
    killed = [number for number, code in enumerate(codes) if code is not None and code < 0]
    if killed and rank not in killed:
        rank = killed[0]
    code = codes[rank]
    if code is None:
        return f"rank {rank} let go of its socket"
    return f"rank {rank} was killed by signal {-code}" if code < 0 else f"rank {rank} ended with exit code {code}"


def _close(channels: list[Channel]) -> None:
    for channel in channels:
        channel.socket.close()
