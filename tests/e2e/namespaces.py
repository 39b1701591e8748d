"""Hosts in network namespaces of their own, joined by a bridge, whose ways can be cut in one direction. Needs root and `ip`.

Nothing of it is in the machine's own network: the bridge has a namespace too. A way is cut by a neighbour entry that points to
no card: what is sent there is lost without a word, as on a real way that works in one direction only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

NO_CARD = "02:00:5e:00:00:00"


class NoNamespaces(RuntimeError):
    """They cannot be had here; the text says why."""


class Hosts:
    """`count` hosts; leaving it removes them, whatever happened."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._tag = f"gm{os.getpid()}"
        self._hub = f"{self._tag}hub"
        self._made: list[str] = []

    def __enter__(self) -> Hosts:
        """Raises NoNamespaces."""
        if os.geteuid() != 0:
            raise NoNamespaces("network namespaces need root")
        if shutil.which("ip") is None:
            raise NoNamespaces("there is no `ip` here")
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self._remove()
            raise NoNamespaces(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def address(self, host: int) -> str:
        return f"10.87.0.{host + 1}"

    def within(self, host: int, command: list[str]) -> list[str]:
        """The command, run on that host; its process id is the command's own."""
        return ["ip", "netns", "exec", self._name(host), *command]

    def cut(self, host: int, other: int) -> None:
        """What `host` sends to `other` is lost; the other direction goes on."""
        _ip("-n", self._name(host), "neigh", "replace", self.address(other), "lladdr", NO_CARD, "dev", "eth0", "nud", "permanent")

    def mend(self, host: int, other: int) -> None:
        _ip("-n", self._name(host), "neigh", "del", self.address(other), "dev", "eth0")

    def unplug(self, host: int) -> None:
        _ip("-n", self._hub, "link", "set", f"port{host}", "down")

    def plug(self, host: int) -> None:
        _ip("-n", self._hub, "link", "set", f"port{host}", "up")

    def left_over(self) -> list[str]:
        """Namespaces of ours that still stand."""
        listed = subprocess.run(["ip", "netns"], capture_output=True, check=True, text=True).stdout
        return [line.split()[0] for line in listed.splitlines() if line.startswith(self._tag)]

    def _name(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def _make(self) -> None:
        self._add(self._hub)
        _ip("-n", self._hub, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self._hub, "link", "set", "bridge0", "up")
        for host in range(self.count):
            name, port = self._name(host), f"port{host}"
            self._add(name)
            _ip("-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._hub, "link", "set", port, "master", "bridge0")
            _ip("-n", self._hub, "link", "set", port, "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)

    def _remove(self) -> None:
        while self._made:
            subprocess.run(["ip", "netns", "del", self._made.pop()], capture_output=True, check=False)


def _ip(*words: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(["ip", *words], capture_output=True, check=True, text=True)
