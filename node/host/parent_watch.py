"""Exit with the parent: a child process ends when the process that started it ends, for any reason.

The starter keeps the only write end of a pipe and hands the read end down. When it dies the kernel closes
its end, the child's read returns, and the child ends itself at once. The kernel's own parent-death signal
follows the *thread* that forked, so it would fire when a worker thread is retired.
"""

from __future__ import annotations

import os
import signal
import threading


def exit_with_parent(read_fd: int) -> None:
    """Ends this process when the other end of the pipe is closed."""
    threading.Thread(target=_wait, args=(read_fd,), name="parent watch", daemon=True).start()


def _wait(read_fd: int) -> None:
    os.set_inheritable(read_fd, False)
    while os.read(read_fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
