"""A node's side of its worker processes: starts them, sends all of them the same requests, ends all when one ends.

Ranks compute in step, so when one dies, fails or is late the others cannot go on: all are killed, and the caller drops the
span. A watcher notices the end of a rank also between requests. The workers hold no state worth saving, so they are ended by
SIGKILL; when the node ends in any other way they exit with it (`node.host.parent_watch`).
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
ENDING_S = 1.0  # how long workers that are about to end are waited for, so that it is known how they ended

log = structlog.get_logger()

M = TypeVar("M", bound=msgspec.Struct)
T = TypeVar("T")


class WorkersLost(MeshError):
    """The workers of a span have ended, and with them whatever they computed. Load the span again."""


class WorkerGroup:
    """`ranks` worker processes. `ask` is for one thread at a time; the rest may be called by any."""

    def __init__(self, ranks: int) -> None:
        self._parent_read, self._parent_write = os.pipe()  # not inheritable but by `pass_fds`
        self._lock = threading.Lock()
        self._ended: str | None = None  # why
        self._over = threading.Event()  # all are gone, and the callback has run
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
        """Their process ids, by rank."""
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

    def tell(self, messages: Sequence[msgspec.Struct], timeout_s: float) -> None:
        """To each rank its own message.

        Raises:
            WorkersLost: one has ended, or does not listen.
        """
        self._send([encoded(message) for message in messages], timeout_s)

    def tell_all(self, message: msgspec.Struct, timeout_s: float) -> None:
        """The same message to all; raises as `tell`."""
        self._send([encoded(message)] * len(self._channels), timeout_s)

    def _send(self, framed: Sequence[bytes], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        for rank, message in enumerate(framed):
            self._guarded(rank, partial(Channel.send_bytes, framed=message, deadline_s=deadline_s))

    def hear(self, kind: type[M], timeout_s: float) -> list[M]:
        """What each rank answers.

        Raises:
            WorkersLost: one has ended, did not answer in time, or said something else.
        """
        deadline_s = time.monotonic() + timeout_s
        return [self._guarded(rank, lambda channel: channel.receive(kind, deadline_s)) for rank in range(len(self._channels))]

    def _guarded(self, rank: int, speak: Callable[[Channel], T]) -> T:
        try:
            return speak(self._channels[rank])
        except TimeoutError:
            reason = f"rank {rank} did not answer in time"
        except msgspec.MsgspecError as error:
            reason = f"rank {rank} answered something else: {error}"
        except (EOFError, OSError):
            reason = self._how_ended(rank)
        self.end(reason)
        raise WorkersLost(f"the span's workers were ended: {self._ended}")

    def _how_ended(self, rank: int) -> str:
        """What became of the workers, `rank` being the one whose socket was seen to close first."""
        deadline_s = time.monotonic() + ENDING_S
        for process in (self._processes[rank], *self._processes):  # a socket closes a moment before its process has ended
            try:
                if process.wait(max(0.0, deadline_s - time.monotonic())) < 0:
                    break  # killed: that explains the others
            except subprocess.TimeoutExpired:
                break
        return cause_of_end(rank, [process.poll() for process in self._processes])

    # ---- the end

    def on_end(self, call: Callable[[str], None]) -> None:
        """Has `call` called with the reason, once, by any thread, when the workers end before `end` is called; or now."""
        with self._lock:
            if self._ended is None:
                self._on_end = call
                return
        call(self._ended)

    def end(self, reason: str = "") -> None:
        """Ends all workers, and waits for that. `reason`: why, where the node did not ask for it."""
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
        """Until a worker's end of its socket is closed, which happens when it ends, however it does."""
        poll = select.poll()
        for channel in self._channels:
            poll.register(channel.socket, 0)  # hang-ups are told of always
        numbers = {channel.socket.fileno(): rank for rank, channel in enumerate(self._channels)}
        self.end(self._how_ended(numbers[poll.poll()[0][0]]))


def cause_of_end(rank: int, codes: Sequence[int | None]) -> str:
    """Why a group of workers ended, by their exit codes; None: it still runs. `rank`: the first that was noticed.

    A worker that is killed makes the sums of the others fail, and one of those may be noticed before it.
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
