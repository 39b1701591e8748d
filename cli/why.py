"""`mesh why`: why a request went where it went."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import options, output


def why(
    request: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="A stream's id, or the x-request-id of its answer.")],
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """Why a request went where it went."""
    with options.client(node, api_key) as client:
        known = client.why(request)
    if json:
        output.as_json(known)
        return
    path = " -> ".join(f"{stage['node']} [{stage['start']}:{stage['end']}]" for stage in known.get("path", ())) or "none yet"
    tokens = f"{known.get('seq', 0)} tokens, attempt {known.get('attempts', 1)}"
    output.line(f"{known['id']}: {known.get('state', '?')}, {tokens}, entry {known.get('entry', '?')}, path {path}")
    reasons = [entry for entry in known.get("why", ()) if isinstance(entry, dict)]
    columns = list(dict.fromkeys(name for entry in reasons for name in entry))
    if columns:
        rows = [[_short(entry.get(column, "")) for column in columns] for entry in reasons]
        output.table([column.upper() for column in columns], rows, empty="")
    for entry in known.get("why", ()):
        if not isinstance(entry, dict):
            output.line(str(entry))


def _short(value: object) -> object:
    return round(value, 2) if isinstance(value, float) else value
