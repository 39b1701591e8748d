"""Members as real processes on loopback: killed, and stopped."""

from __future__ import annotations

import sys

import pytest

from bench.processes import Members

pytestmark = pytest.mark.e2e
COMMAND = [sys.executable, "-m", "bench.member"]


def test_every_survivor_knows_of_a_killed_process_within_half_a_second_and_why() -> None:
    members = Members(COMMAND, 5)
    try:
        took = members.kill(2, within_s=10)
        assert len(took) == 4 and took[-1] < 0.5, took
        dead = [line for told in members.told for line in told if line.get("state") == "dead"]
        assert {(line["node"], line["cause"]) for line in dead} == {(members.names[2], "refused")}
        assert members.false_deaths() == 0
    finally:
        members.close()
