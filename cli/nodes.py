"""`mesh nodes`: the members and their states."""

from __future__ import annotations

from collections.abc import Mapping

from cli import options, output
from mesh.json_object import JsonObject

WRAPS = ("STATE", "LAYERS")
COLUMNS = ("NODE", "STATE", "HTTP", "LAYERS", "RUNNING", "WAITING", "KV BLOCKS", "RTT MS", "REGION", "ID")


def rtt(node: Mapping[str, object]) -> str:
    """The round trip from the node that was asked: measured, else estimated from coordinates, marked with `~`."""
    measured_ms, estimate_ms = node.get("rtt_ms"), node.get("rtt_estimate_ms")
    if node["state"] not in ("alive", "suspect") or (measured_ms is None and estimate_ms is None):
        return "-"
    return f"{measured_ms:.1f}" if measured_ms is not None else f"~{estimate_ms:.1f}"


def node_rows(seen: JsonObject) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Columns and rows for the nodes of a status."""
    rows: list[tuple[object, ...]] = []
    for node in seen["nodes"]:
        load = node.get("load") or {}
        blocks = f"{load.get('kv_blocks_used', 0)}/{load.get('kv_blocks_total', 0)}"
        state = node["state"] + (f" ({node['cause']})" if node.get("cause") else "")
        if loading := node.get("loading"):
            state += f", loading {min(each['progress'] for each in loading):.0%}"
        elif node["state"] in ("alive", "suspect") and (ready := node.get("readiness", "warm")) != "warm":
            state += f", {ready}"
        elif node.get("draining"):
            state += ", draining"
        running, waiting = load.get("running", 0), load.get("waiting", 0)
        if node["state"] not in ("alive", "suspect"):
            running = waiting = blocks = "-"
        layers = output.spans(node.get("spans", ()))
        row = (
            node["name"],
            state,
            node["http"],
            layers,
            running,
            waiting,
            blocks,
            rtt(node),
            node.get("region") or "-",
            node["id"],
        )
        rows.append(row)
    return COLUMNS, rows


def nodes(
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """The nodes of the mesh, with their state, layers and load."""
    with options.client(node, api_key) as client:
        seen = client.status()
    if json:
        output.as_json(seen["nodes"])
    else:
        output.table(*node_rows(seen), empty="no nodes", wraps=WRAPS)
