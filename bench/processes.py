"""Real member processes on loopback, one killed with SIGKILL: when does each survivor know, by the machine's own clock?"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

START_WITHIN_S = 60.0


class Members:
    """Started and joined; `kill` measures. `commands`: one for each, where they differ."""

    def __init__(self, command: list[str], count: int, commands: list[list[str]] | None = None) -> None:
        self.told: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for command in commands or [command] * count
        ]
        self._readers = [threading.Thread(target=self._read, args=(number,), daemon=True) for number in range(count)]
        for reader in self._readers:
            reader.start()
        self._until(lambda: all(any("me" in line for line in told) for told in self.told), "all have started")
        self.names = [next(line["me"] for line in told if "me" in line) for told in self.told]
        seed = next(line["address"] for line in self.told[0] if "me" in line)
        for number in range(1, count):
            self.say(number, seed)
        self._until(lambda: all(len(self._alive(number)) >= count - 1 for number in range(count)), "all have joined")

    def say(self, number: int, line: str) -> None:
        """To its stdin."""
        stdin = self._processes[number].stdin
        assert stdin is not None
        stdin.write(line + "\n")
        stdin.flush()

    def signal(self, number: int, with_signal: signal.Signals) -> None:
        os.kill(self._processes[number].pid, with_signal)

    def state(self, by: int, number: int) -> str | None:
        """What `by` told last of the other's state."""
        states = [line["state"] for line in list(self.told[by]) if line.get("node") == self.names[number]]
        return states[-1] if states else None

    def wait_state(self, by: list[int], number: int, state: str, within_s: float) -> None:
        """Until each of `by` has told it. Raises TimeoutError."""
        self._until(lambda: all(self.state(one, number) == state for one in by), f"{by} tell of {number}: {state}", within_s)

    def deaths(self) -> set[tuple[int, int]]:
        """(by whom, of whom) of all that were ever told."""
        number_of = {name: number for number, name in enumerate(self.names)}
        said = [(by, line) for by, told in enumerate(self.told) for line in list(told) if line.get("state") == "dead"]
        return {(by, number_of[line["node"]]) for by, line in said}

    def _read(self, number: int) -> None:
        stdout = self._processes[number].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith("{"):  # a member's log comes the same way
                self.told[number].append(json.loads(line))

    def _alive(self, number: int) -> set[str]:
        return {line["node"] for line in self.told[number] if line.get("state") == "alive"} - {self.names[number]}

    def _until(self, condition: Callable[[], bool], what: str, within_s: float = START_WITHIN_S) -> None:
        ends_at = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > ends_at:
                self.close()
                raise TimeoutError(f"not within {within_s:g} s: {what}")
            time.sleep(0.02)

    def kill(self, number: int, within_s: float) -> list[float]:
        """Seconds until each survivor had it dead, ascending.

        Raises:
            TimeoutError: some survivor did not.
        """
        name, killed_at = self.names[number], time.monotonic()
        os.kill(self._processes[number].pid, signal.SIGKILL)
        self._processes[number].wait()
        survivors = [other for other, process in enumerate(self._processes) if process.poll() is None]

        def seen(other: int) -> float | None:
            lines = (line for line in list(self.told[other]) if line.get("node") == name and line["at"] > killed_at)
            return next((line["at"] - killed_at for line in lines if line.get("state") == "dead"), None)

        self._until(lambda: all(seen(other) is not None for other in survivors), f"all know of {name}", within_s)
        return sorted(took for other in survivors if (took := seen(other)) is not None)

    def false_deaths(self) -> int:
        """Survivors that some survivor ever had dead."""
        up = {self.names[number] for number, process in enumerate(self._processes) if process.poll() is None}
        said = {line["node"] for told in self.told for line in told if line.get("state") == "dead"}
        return len(up & said)

    def close(self) -> None:
        for process, reader in zip(self._processes, self._readers):
            process.kill()
            process.wait()
            reader.join()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()


def measure(command: list[str], count: int, kills: int, settle_s: float, within_s: float = 30.0) -> dict[str, Any]:
    """`every_node_s`: when the last survivor knew, of each kill."""
    members = Members(command, count)
    try:
        time.sleep(settle_s)
        took = [members.kill(number, within_s) for number in range(1, 1 + kills)]
        return {
            "processes": count,
            "kills": kills,
            "first_p50_s": round(statistics.median(times[0] for times in took), 4),
            "every_node_p50_s": round(statistics.median(times[-1] for times in took), 4),
            "every_node_max_s": round(max(times[-1] for times in took), 4),
            "false_deaths": members.false_deaths(),
        }
    finally:
        members.close()
