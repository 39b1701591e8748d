"""Several real nodes on this machine: for the demo, the end-to-end tests and the benchmarks.

Each is a process of its own with a data directory of its own. They exit with their parent (`node.host.parent_watch`), so none
outlives the process that started it, even when that is killed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import IO

from mesh.errors import MeshError

ANNOUNCEMENT = re.compile(r"mesh node (?P<name>\S+) up: (?P<http>https?://\S+) gossip (?P<gossip>\S+)")
START_TIMEOUT_S = 90.0  # importing torch on a busy machine takes most of it
STOP_TIMEOUT_S = 15.0
LOG_TAIL_LINES = 15


class NodeFailed(MeshError):
    """A node's process ended, or announced nothing in time; the message ends with the last lines of its log."""


@dataclass(slots=True)
class LocalNode:
    """One node's process. `http` is a URL, `gossip` is HOST:PORT; both are empty until it has announced itself."""

    name: str
    process: subprocess.Popen[str]
    data_dir: Path
    log: Path
    stdout: SimpleQueue[str]  # its lines; an empty one at its end
    http: str = ""
    gossip: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class LocalMesh:
    """A context manager: every process it started has ended, and its files are gone, when it is left.

    folder: where data directories and logs go and stay; None: a temporary one.
    """

    command: tuple[str, ...] = (sys.executable, "-m", "cli")
    start_process: Callable[..., subprocess.Popen[str]] = staticmethod(subprocess.Popen)

    def __init__(self, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        self.nodes: list[LocalNode] = []
        self._keep = folder is not None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="mesh-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # several nodes share the machine: more threads than cores cost each one its time slices
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        # Where the packages are imported from, so that a checkout works from any working directory.
        root = str(Path(__file__).resolve().parent.parent)
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, self._environment.get("PYTHONPATH"))))
        self._parent_read, self._parent_write = os.pipe()  # not inheritable but by `pass_fds`

    def start(
        self, name: str, *options: str, join: Sequence[LocalNode] | None = None, timeout_s: float = START_TIMEOUT_S
    ) -> LocalNode:
        """Starts a node and waits for its announcement. It joins the live ones so far, or those of `join`.

        Raises:
            NodeFailed
        """
        node = self.launch(name, *options, join=join)
        self.wait_announced(node, timeout_s)
        return node

    def start_all(self, options: Mapping[str, Sequence[str]], timeout_s: float = START_TIMEOUT_S) -> list[LocalNode]:
        """Starts a mesh of nodes by name, the later ones at the same time once the first can be joined.

        Raises:
            NodeFailed
        """
        (first, first_options), *others = options.items()
        nodes = [self.start(first, *first_options, timeout_s=timeout_s)]
        nodes += [self.launch(name, *given, join=nodes[:1]) for name, given in others]
        for node in nodes[1:]:
            self.wait_announced(node, timeout_s)
        return nodes

    def launch(self, name: str, *options: str, join: Sequence[LocalNode] | None = None) -> LocalNode:
        """Starts a node's process without waiting for it. The same name again is a restart on the same data directory."""
        data_dir, log = self.folder / name, self.folder / f"{name}.log"
        joined = [node for node in self.nodes if node.alive and node.gossip] if join is None else join
        command = [*self.command, "up", "--name", name, "--bind", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        command += ["--data-dir", str(data_dir), "--exit-with-parent", str(self._parent_read)]
        for other in joined:
            command += ["--join", other.gossip]
        with log.open("a") as stderr:
            process = self.start_process(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=self._environment,
                pass_fds=(self._parent_read,),
                start_new_session=True,  # a Ctrl-C at the terminal is ours to handle
            )
        lines: SimpleQueue[str] = SimpleQueue()
        assert process.stdout is not None
        Thread(target=_read_lines, args=(process.stdout, lines), name=f"stdout of {name}", daemon=True).start()
        node = LocalNode(name, process, data_dir, log, lines)
        self.nodes.append(node)
        return node

    def wait_announced(self, node: LocalNode, timeout_s: float = START_TIMEOUT_S) -> None:
        """Waits for the one line a node prints when its HTTP answers.

        Raises:
            NodeFailed
        """
        deadline = time.monotonic() + timeout_s
        while not node.http:
            try:
                line = node.stdout.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                raise self._failed(node, f"did not announce itself within {timeout_s:.0f} s") from None
            if not line:
                raise self._failed(node, f"ended with exit code {node.process.wait()} before it announced itself")
            if match := ANNOUNCEMENT.fullmatch(line.strip()):
                node.http, node.gossip = match["http"].rstrip("/"), match["gossip"]

    def _failed(self, node: LocalNode, what: str) -> NodeFailed:
        return NodeFailed(f"node {node.name} {what}; the end of its log:\n{node.log_tail()}")

    def kill(self, node: LocalNode, with_signal: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal; after SIGKILL, waits until the process is gone."""
        if node.alive:
            node.process.send_signal(with_signal)
            if with_signal is signal.SIGKILL:
                node.process.wait()

    def stop(self, node: LocalNode, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ends a node the regular way, by SIGTERM; its exit code. One that does not end in time is killed."""
        self.kill(node, signal.SIGTERM)
        try:
            return node.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill(node)
            return node.process.wait()

    def close(self) -> None:
        """Ends all nodes at once and removes their files. They need not hand over to each other: SIGKILL."""
        for node in self.nodes:
            if node.alive:
                node.process.kill()
        for node in self.nodes:
            node.process.wait()
        os.close(self._parent_write)
        os.close(self._parent_read)
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LocalMesh:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _read_lines(stdout: IO[str], lines: SimpleQueue[str]) -> None:
    """Passes on each line, and an empty one at the end; a node prints one, but a full pipe would stall one that prints more."""
    with stdout:
        for line in stdout:
            lines.put(line)
    lines.put("")
