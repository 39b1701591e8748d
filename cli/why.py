"""`mesh why`: why a request went where it went."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated

import typer

from cli import options, output
from mesh.json_object import JsonObject


def why(
    request: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="A stream's id, or the x-request-id of its answer.")],
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """Why a request went where it went: each plan's candidates, with their expected cost in ms, term by term."""
    with options.client(node, api_key) as client:
        known = client.why(request)
        names = {peer["id"]: peer["name"] for peer in client.status()["nodes"]}
    if json:
        output.as_json(known)
        return
    tokens = f"{known['seq']} tokens, attempts {known['attempts']}"
    output.paragraph(f"{known['id']}: {known['state']}, {tokens}, entry {names.get(known['entry'], known['entry'])}", indent="  ")
    output.paragraph(f"path {_path(known['path'], names) or 'none yet'}", indent="  ")
    plans = known["why"]
    terms = sorted({term for plan in plans for candidate in plan["candidates"] for term in candidate["terms_ms"]})
    columns = ["CHOICE", "ATTEMPT", "STAGE", "RANK", "NODE", "COST_MS", *(term.upper() for term in terms)]
    output.table(columns, _rows(plans, names, terms), empty="no path was planned", keys=columns.index("COST_MS"))


def _path(stages: Iterable[JsonObject], names: Mapping[str, str]) -> str:
    return " -> ".join(f"{names.get(stage['node'], stage['node'])} [{stage['start']}:{stage['end']}]" for stage in stages)


def _rows(plans: Iterable[JsonObject], names: Mapping[str, str], terms: Iterable[str]) -> Iterator[list[object]]:
    for plan in plans:
        for candidate in plan["candidates"]:
            costs = candidate["terms_ms"]
            yield [
                plan["choice"],
                plan["attempt"],
                candidate["stage"],
                candidate["rank"],
                names.get(candidate["node"], candidate["node"]),
                f"{sum(costs.values()):.1f}",
                *(f"{costs[term]:.1f}" if term in costs else "-" for term in terms),
            ]
