"""`python -m node.engine.parallel SOCKET PARENT`: a worker process, with two file descriptors that its node passes to it.

A worker ignores signals that a terminal or a supervisor sends to all processes of a node: the node handles them, and needs
its workers while it drains. Watching the parent begins before the slow imports, for the node may end during them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from node.host import parent_watch


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent_watch.exit_with_parent(int(sys.argv[2]))
    from node.engine.parallel.messages import Channel
    from node.engine.parallel.rank import serve  # imports torch

    with socket.socket(fileno=int(sys.argv[1])) as end:
        end.set_inheritable(False)
        try:
            serve(Channel(end))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the node has ended, or has closed this rank
    os._exit(0)  # torch's own teardown takes seconds


if __name__ == "__main__":
    main()
