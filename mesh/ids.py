"""Names of things that two nodes must agree on."""

from __future__ import annotations

from ipaddress import ip_address
from typing import NewType

NodeId = NewType("NodeId", str)
"""A node, for life: 16 lower-case hex digits, kept in its data directory. Its name and address are attributes."""

ModelId = NewType("ModelId", str)
"""A model as clients name it."""

StreamId = NewType("StreamId", str)
"""A generation: the `id` of its chunks, `chatcmpl-…` or `cmpl-…`."""

Address = tuple[str, int]
"""Host and port: gossip datagrams (UDP) and peer links (TCP) share one number."""


def parse_address(text: str, default_host: str = "127.0.0.1") -> Address:
    """`HOST:PORT`, `:PORT` or `[V6]:PORT` as an address.

    Raises:
        ValueError: with what was expected, naming what came.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT with a port from 0 to 65535, got {text!r}")
    return host.strip("[]") or default_host, int(port)


def is_ip(host: str) -> bool:
    """Whether `host` is an address as it stands: nothing is looked up for one, which may take seconds."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def format_address(address: Address) -> str:
    """The text form that `parse_address` reads."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
