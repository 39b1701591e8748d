"""Starts nodes by forking a process that has imported torch and transformers already, so a start costs a fifth of the CPU time.

`ForkServer` runs this file as a process of its own, before it has any thread. For each node that process forks; the child takes
the descriptors, the environment and the arguments that `subprocess.Popen` would have given it, and runs the `mesh` command.
From there on it is a node like any other: a process with a session of its own, killed and stopped by its process id.

What a fork does not show is the imports themselves and what libraries read from the environment while they are loaded, so
`ForkServer.popen` forks only for a `mesh up` in the environment of this test run; all else it starts in the usual way.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from typing import IO, Any, NoReturn

COMMAND = (sys.executable, "-m", "cli", "up")
# What a node imports until it serves documents too; those that are imported inside a function are named one by one.
PRELOADED = (
    "cli.main",
    "node.main",
    "node.engine.worker",
    "node.engine.default_model",
    "sentence_transformers",
    "transformers.models.llama.modeling_llama",
)
PER_TEST = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION"}  # variables that a node does not read
MESSAGE_MAX_BYTES = 1 << 20
FIRST_SPARE_FD = 500  # descriptors on their way into a child stay above those that it ends up with


class ForkedProcess:
    """A forked node, with what `LocalNode` uses of `subprocess.Popen`: its parent, the fork server, tells of its end."""

    def __init__(self, life: socket.socket, stdout: IO[str]) -> None:
        self._life = life
        self.stdout = stdout
        self.returncode: int | None = None
        self.pid = int(self._hear(None))

    def _hear(self, timeout_s: float | None) -> str:
        """The next line from the fork server; empty where it says nothing in time."""
        ready, _, _ = select.select([self._life], [], [], timeout_s)
        if not ready:
            return ""
        heard = self._life.recv(64)
        assert heard, "the fork server has ended"
        return heard.decode()

    def poll(self) -> int | None:
        if self.returncode is None and (heard := self._hear(0)):
            self.returncode = int(heard)
            self._life.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            heard = self._hear(timeout)
            if not heard:
                raise subprocess.TimeoutExpired(COMMAND, timeout or 0.0)
            self.returncode = int(heard)
            self._life.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks, started when the first node is. `popen` takes the place of `subprocess.Popen`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment: dict[str, str] = {}

    def popen(self, command: list[str], **given: Any) -> subprocess.Popen[str] | ForkedProcess:
        """A process that runs `command`; forked where that shows the same."""
        environment = given["env"]
        if tuple(command[: len(COMMAND)]) != COMMAND or not self._serves(environment):
            return subprocess.Popen(command, **given)
        (parent_fd,) = given["pass_fds"]
        life, childs_life = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reads, writes = os.pipe()
        message = json.dumps({"words": command[3:], "environment": environment, "folder": os.getcwd(), "parent_fd": parent_fd})
        with childs_life:
            fds = [childs_life.fileno(), writes, given["stderr"].fileno(), parent_fd]
            socket.send_fds(self._control, [message.encode()], fds)
        os.close(writes)
        return ForkedProcess(life, os.fdopen(reads))

    def _serves(self, environment: dict[str, str]) -> bool:
        """Whether the server was started in this environment; it is started in that of the first node."""
        plain = {name: value for name, value in environment.items() if name not in PER_TEST}
        if self._process is None:
            self._environment = plain
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.forked_nodes", str(self._theirs.fileno())],
                env=environment,
                pass_fds=[self._theirs.fileno()],
            )
            self._theirs.close()
        return plain == self._environment

    def close(self) -> None:
        """Ends the server; its nodes have been ended by the meshes that they belong to."""
        self._control.close()
        self._theirs.close()
        if self._process is not None:
            self._process.wait()


def serve(control: socket.socket) -> None:
    """Forks on request, and tells of each child's end, until the test run closes its side."""
    for module in PRELOADED:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    gc.collect()
    gc.freeze()  # what is there now is shared with all children, and no collection writes to it
    children: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> process id, and where its end is told
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd in children:
                poll.unregister(fd)
                pid, life = children.pop(fd)
                _tell(life, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                life.close()
                os.close(fd)
                continue
            message, fds, _, _ = socket.recv_fds(control, MESSAGE_MAX_BYTES, 4)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                _become_node(json.loads(message), fds)
            life = socket.socket(fileno=fds[0])
            for other in fds[1:]:
                os.close(other)
            watched = os.pidfd_open(pid)
            children[watched] = pid, life
            poll.register(watched, select.POLLIN)
            _tell(life, pid)


def _tell(life: socket.socket, number: int) -> None:
    try:
        life.send(str(number).encode())
    except OSError:
        pass  # the mesh that the node belongs to is gone


def _become_node(asked: dict[str, Any], fds: list[int]) -> NoReturn:
    """In the child: runs the command in the place of the server, and ends the process as the interpreter would."""
    code = 1
    try:
        os.setsid()
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        _, stdout, stderr, parent_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_SPARE_FD) for fd in fds)
        stdin = fcntl.fcntl(os.open(os.devnull, os.O_RDONLY), fcntl.F_DUPFD, FIRST_SPARE_FD)
        os.closerange(3, FIRST_SPARE_FD)
        for fd, becomes in ((stdin, 0), (stdout, 1), (stderr, 2), (parent_fd, asked["parent_fd"])):
            os.dup2(fd, becomes)
        os.closerange(FIRST_SPARE_FD, FIRST_SPARE_FD + 100)
        sys.argv = ["mesh", *asked["words"]]
        from cli.main import app

        app(prog_name="mesh")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:  # ends the process also while an exception is on its way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as from_tests:
        serve(from_tests)
