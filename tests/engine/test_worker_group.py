"""Worker processes end with their node, whatever ends it, and one that dies or hangs is noticed. They never get to compute."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from node.engine.parallel.messages import (
    MAX_BYTES,
    Channel,
    ForgetNumber,
    ForwardStep,
    GroupJoined,
    KeepPage,
    SegmentRows,
    encoded,
)
from node.engine.parallel.worker_group import ROOT, WorkerGroup, WorkersLost, cause_of_end
from tests.engine.test_worker import wait_until

pytestmark = pytest.mark.no_kernel

WAIT_S = 20.0


@contextmanager
def crew_of(ranks: int) -> Iterator[WorkerGroup]:
    workers = WorkerGroup(ranks)
    try:
        yield workers
    finally:
        workers.end()


def assert_gone(pids: tuple[int, ...]) -> None:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=WAIT_S)
    assert not alive


def test_a_worker_that_is_killed_takes_the_others_along_and_is_told_of_once() -> None:
    with crew_of(3) as workers:
        told: queue.Queue[str] = queue.Queue()
        workers.on_end(told.put)
        os.kill(workers.processes[1], signal.SIGKILL)
        assert told.get(timeout=WAIT_S) == "rank 1 was killed by signal 9"
        assert_gone(workers.processes)
        with pytest.raises(WorkersLost, match="rank 1 was killed by signal 9"):
            workers.receive_from_all(GroupJoined, WAIT_S)
        workers.on_end(told.put)  # who asks too late is told at once
        assert told.get_nowait() == "rank 1 was killed by signal 9"
        assert told.empty()


@pytest.mark.parametrize(
    ("rank", "codes", "cause"),
    [
        (0, [1, -9], "rank 1 was killed by signal 9"),
        (0, [None, -9], "rank 1 was killed by signal 9"),
        (1, [-15, -9], "rank 1 was killed by signal 9"),
        (1, [None, 3], "rank 1 ended with exit code 3"),
        (0, [1, 1], "rank 0 ended with exit code 1"),
        (0, [None, 1], "rank 0 let go of its socket"),
    ],
)
def test_a_worker_whose_sums_failed_is_not_blamed_for_one_that_was_killed(rank: int, codes: list[int | None], cause: str) -> None:
    assert cause_of_end(rank, codes) == cause


def test_a_worker_that_hangs_is_given_up_at_the_deadline() -> None:
    with crew_of(2) as workers:
        for pid in workers.processes:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkersLost, match="rank 0 did not answer in time"):
            workers.receive_from_all(GroupJoined, 0.05)
        assert_gone(workers.processes)


def test_workers_that_are_told_to_end_do_so_and_nobody_is_alarmed() -> None:
    with crew_of(2) as workers:
        told: list[str] = []
        workers.on_end(told.append)
        workers.end()
        assert_gone(workers.processes)
        with pytest.raises(WorkersLost, match="told to end"):
            workers.receive_from_all(GroupJoined, WAIT_S)
        assert not told


def test_workers_end_with_a_node_that_is_killed() -> None:
    node = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from node.engine.parallel.worker_group import WorkerGroup; print(*WorkerGroup(2).processes, flush=True); input()",
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with node:
        assert node.stdout is not None
        workers = tuple(int(pid) for pid in node.stdout.readline().split())
        assert len(workers) == 2
        node.kill()
    assert_gone(workers)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what a process ignores from /proc")
def test_workers_leave_the_signals_of_a_terminal_to_their_node() -> None:
    with crew_of(1) as workers:
        status = Path(f"/proc/{workers.processes[0]}/status")

        def ignored() -> set[int]:
            bits = next(int(line.split()[1], 16) for line in status.read_text().splitlines() if line.startswith("SigIgn"))
            return {number for number in range(1, 32) if bits >> (number - 1) & 1}

        wait_until(lambda: {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} <= ignored())


# ---- what is said


def test_a_message_comes_whole_however_it_was_cut_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        step = ForwardStep(
            3,
            (KeepPage(1, 2, 0, 16, 0, 4), ForgetNumber(5, page=True)),
            0,
            4,
            (SegmentRows(0, 1, 7, 2),),
            (7,),
            (11,),
            None,
            (0,),
        )
        framed = encoded(step)

        def drip() -> None:
            for at in range(0, len(framed), 3):
                ours.sendall(framed[at : at + 3])

        writer = threading.Thread(target=drip)
        writer.start()
        assert Channel(theirs).receive(ForwardStep, time.monotonic() + WAIT_S) == step
        writer.join()


def test_a_message_that_is_too_long_is_refused_before_it_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((MAX_BYTES + 1).to_bytes(8, "little"))
        with pytest.raises(msgspec.ValidationError, match="expected at most"):
            Channel(theirs).receive(ForwardStep)


def test_silence_until_the_deadline_is_an_error_and_so_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(TimeoutError):
            Channel(theirs).receive(ForwardStep, time.monotonic() + 0.01)
        ours.sendall(encoded(GroupJoined())[:5])
        ours.close()
        with pytest.raises(EOFError):
            Channel(theirs).receive(GroupJoined, time.monotonic() + WAIT_S)
