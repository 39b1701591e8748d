"""Types of ids and addresses that all nodes share."""

from __future__ import annotations

from ipaddress import ip_address
from typing import NewType

NodeId = NewType("NodeId", str)
"""A node's permanent id: 16 lower-case hex digits, derived from the key in its data directory. Name and address may change."""

ModelId = NewType("ModelId", str)
"""A model's id in requests."""

StreamId = NewType("StreamId", str)
"""A generation's id, which is the `id` of its chunks: `chatcmpl-…` or `cmpl-…`."""

Address = tuple[str, int]
"""Host and port: gossip datagrams (UDP) and peer links (TCP) use the same port number."""


def parse_address(text: str, default_host: str = "127.0.0.1") -> Address:
    """Parses `HOST:PORT`, `:PORT` or `[V6]:PORT`.

    Raises:
        ValueError: the text has another form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT with a port from 0 to 65535, got {text!r}")
    return host.strip("[]") or default_host, int(port)


def is_ip(host: str) -> bool:
    """Returns whether `host` is an IP address, which needs no lookup; a lookup may take seconds."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def format_address(address: Address) -> str:
    """Returns the text form that `parse_address` reads."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
