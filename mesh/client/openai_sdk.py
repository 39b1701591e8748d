"""The official `openai` client for a node; as the mesh's client, it uses a proxy only where the caller names one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

from mesh.client.transport import proxied
from mesh.errors import LocalError


def openai_module() -> ModuleType:
    """Imports the `openai` package. Raises LocalError: it is not installed."""
    try:
        import openai
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise LocalError("Client.openai() needs the openai package; install it with: pip install openai") from None
    return openai


def arguments(
    node: str, api_key: str | None, default_http: Callable[..., object], proxy: str | None, options: Mapping[str, object]
) -> dict[str, object]:
    """Returns the arguments of the official client for `node`.

    `default_http`: makes its HTTP client; `options`: the caller's own arguments, which replace the others.
    """
    http = {} if "http_client" in options else {"http_client": proxied(default_http, proxy)}
    return {"base_url": f"{node}/v1", "api_key": api_key or "none", **http, **options}
