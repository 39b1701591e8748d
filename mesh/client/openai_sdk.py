"""The official `openai` client, pointed at a node, which it reaches as our own client does: through no proxy unless asked to."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mesh.client.transport import proxied
from mesh.errors import LocalError


def openai_module() -> ModuleType:
    """Raises LocalError: the package is not installed."""
    try:
        import openai
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise LocalError("Client.openai() needs the openai package; install it with: pip install openai") from None
    return openai


def arguments(node: str, api_key: str | None, default_http: Any, proxy: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Of the official client for `node`. `default_http`: makes its HTTP client; `options`: what the caller wants otherwise."""
    http = {} if "http_client" in options else {"http_client": proxied(default_http, proxy)}
    return {"base_url": f"{node}/v1", "api_key": api_key or "none", **http, **options}
