"""`python -m node.engine.parallel SOCKET PARENT`: a worker process, given two file descriptors by its node.

Signals that a terminal or a supervisor sends to all processes of a node at once are left to the node: it drains, and needs
its workers for that. The watch on the parent begins before anything that takes time: the node may end while this process starts.
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
            pass  # the node is gone, or wants this rank no more
    os._exit(0)  # with torch an orderly end takes seconds


if __name__ == "__main__":
    main()
