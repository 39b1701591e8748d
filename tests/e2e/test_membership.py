"""Members as real processes on loopback: killed, stopped, and with a loop that stands still."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator

import pytest

from bench.processes import Members

pytestmark = pytest.mark.e2e
COMMAND = [sys.executable, "-m", "bench.member"]
BLOCKED_S = 10.0


@pytest.fixture
def members() -> Iterator[Members]:
    members = Members(COMMAND, 5)
    try:
        yield members
    finally:
        members.close()


def test_every_survivor_knows_of_a_killed_process_within_half_a_second_and_why(members: Members) -> None:
    took = members.kill(2, within_s=10)
    assert len(took) == 4 and took[-1] < 0.5, took
    dead = [line for told in members.told for line in told if line.get("state") == "dead"]
    assert {(line["node"], line["cause"]) for line in dead} == {(members.names[2], "refused")}
    assert members.false_deaths() == 0


def test_a_loop_that_sleeps_and_a_process_that_is_stopped_for_ten_seconds_kill_nobody(members: Members) -> None:
    began = time.monotonic()
    members.say(1, f"block {BLOCKED_S:g}")
    members.signal(2, signal.SIGSTOP)
    others = [0, 3, 4]
    for silent in (1, 2):
        members.wait_state(others, silent, "suspect", within_s=6)
    time.sleep(max(0.0, began + BLOCKED_S - time.monotonic()))
    members.signal(2, signal.SIGCONT)
    for silent in (1, 2):
        members.wait_state([*others, 3 - silent], silent, "alive", within_s=5)
    assert members.deaths() == set()


def test_one_killed_while_it_is_stopped_is_dead_to_all_soon(members: Members) -> None:
    members.signal(3, signal.SIGSTOP)
    members.wait_state([0, 1, 2, 4], 3, "suspect", within_s=6)
    took = members.kill(3, within_s=10)
    assert len(took) == 4 and took[-1] < 5, took
    assert members.deaths() == {(by, 3) for by in (0, 1, 2, 4)}
