"""A trace is on disk when somebody asks for it, whole, for its owner only; and never costs the node its life."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import structlog.testing
import trio
import trio.testing

from node.ops.trace_file import FILE_NAME, TraceFile


async def test_a_signal_writes_the_trace_as_it_is_then_for_its_owner_only(tmp_path: Path) -> None:
    dumps = iter([b"first", b"second"])
    written = tmp_path / FILE_NAME
    async with trio.open_nursery() as nursery:
        nursery.start_soon(TraceFile(tmp_path, lambda: next(dumps)).run)
        await trio.testing.wait_all_tasks_blocked()
        for expected in (b"first", b"second"):
            os.kill(os.getpid(), signal.SIGUSR1)
            with trio.fail_after(5):
                while not written.exists() or written.read_bytes() != expected:
                    await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert written.stat().st_mode & 0o777 == 0o600 and os.listdir(tmp_path) == [FILE_NAME]


async def test_one_who_asks_for_a_trace_that_is_not_kept_is_told_why_there_is_none(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(TraceFile(tmp_path, lambda: None).run)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(os.getpid(), signal.SIGUSR1)
            with trio.fail_after(5):
                while not logs:
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
    assert logs[0]["event"] == "membership.trace_not_kept" and "--trace-mb" in logs[0]["why"]


async def test_where_none_is_kept_or_the_disk_takes_none_nothing_is_written_and_nothing_breaks(tmp_path: Path) -> None:
    assert not await TraceFile(tmp_path, lambda: None).write()
    assert await TraceFile(tmp_path / "gone", lambda: b"trace").write()
    assert os.listdir(tmp_path) == []
