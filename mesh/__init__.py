"""Ids, wire formats, keys and links that all nodes share, and the client: `from mesh import Client`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> type[AsyncClient | Client]:
    """Loads the client on first use: nodes import this package without it."""
    if name in __all__:
        from mesh.client import client

        return client.Client if name == "Client" else client.AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
