"""`mesh status`: the mesh as one node sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cli import options, output
from cli.nodes import WRAPS, node_rows
from mesh.json_object import JsonObject

GIB = 1 << 30
HASH_DIGITS = 8  # of the hash of a model's weights: enough to tell two apart


def short_hash(model: Mapping[str, object]) -> str:
    """Which weights a row of a status is about; a dash where they are not known yet."""
    return str(model.get("weights", ""))[:HASH_DIGITS] or "-"


def several_versions(models: Sequence[Mapping[str, object]]) -> list[str]:
    """Says of each id that stands for several sets of weights which of them answers, by which rule, and the others' names."""
    rows = []
    for answering in models:
        others = [each for each in models if each["id"] == answering["id"] and not each.get("answers", True)]
        if answering.get("answers", True) and others:
            names = ", ".join(f"{each['name']} (served by {each['nodes']})" for each in others)
            rows.append(
                f"{1 + len(others)} sets of weights are called {answering['id']}, and they are no replicas of each other. "
                f"{short_hash(answering)} answers to the name (served by {answering['nodes']}): first comes one whose layers "
                f"are all held, then the one that more nodes serve, then the newer. Ask for another as {names}"
            )
    return rows


def completeness(model: JsonObject) -> str:
    """Whether a model of a status can answer, and if not, what is to be waited for."""
    if model["complete"]:
        return "yes"
    if loading := model.get("loading"):
        return f"no: loading {loading['progress']:.0%}, {loading['eta_s']:.0f} s to go"
    return "no: layers are missing"


def status(
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """The mesh as one node sees it: its nodes, models and document stores."""
    with options.client(node, api_key) as client:
        seen = client.status()
    if json:
        output.as_json(seen)
        return
    me = seen["self"]
    output.paragraph(f"asked {me['name']} ({me['id']}), version {me.get('version') or '?'}")
    output.paragraph(f"at {me['http']}, gossip {me['gossip']}")
    for span, kernel in me.get("kernels", {}).items():
        output.paragraph(f"{span} is computed by {kernel}", indent="  ")
        if choice := me.get("kernel_choices", {}).get(span):
            output.paragraph(f"  {_why(choice)}", indent="    ")
    if uncompiled := me.get("uncompiled"):
        do = f"; {uncompiled['do']}" if uncompiled["do"] else ""
        output.paragraph(f"without the compiled kernel ({uncompiled['why']}): {uncompiled['costs']}{do}", indent="  ")
    for span, load in me.get("loading", {}).items():
        output.paragraph(
            f"{span} is loading for {load['seconds']:.0f} s: {load['phase']}, {load['layers_done']} of {load['layers']} layers, "
            f"{load['bytes_done'] / GIB:.2f} of {load['bytes'] / GIB:.2f} GiB",
            indent="  ",
        )
    for model, hashed in me.get("hashing", {}).items():
        of = f"{hashed['bytes_done'] / GIB:.2f} of {hashed['bytes'] / GIB:.2f} GiB"
        output.paragraph(f"the files of {model} are being hashed: {of}", indent="  ")
    output.line()
    output.table(*node_rows(seen), empty="no nodes", wraps=WRAPS)
    output.line()
    models = [
        (
            model.get("name", model["id"]),
            short_hash(model),
            model["layers"],
            completeness(model),
            model["min_replicas"],
            model.get("numerics", "unknown"),
        )
        for model in seen["models"]
    ]
    columns = ("MODEL", "WEIGHTS", "LAYERS", "COMPLETE", "REPLICAS", "ANSWERS")
    output.table(columns, models, empty="no models", wraps=("COMPLETE",))
    for line in several_versions(seen["models"]):
        output.paragraph(line)
    stores = [
        (store["name"], store["documents"], store["shards"], store["replicas"], "yes" if store["in_sync"] else "no")
        for store in seen["stores"]
    ]
    if stores:
        output.line()
        output.table(("STORE", "DOCUMENTS", "SHARDS", "REPLICAS", "IN SYNC"), stores, empty="")


def _why(choice: JsonObject) -> str:
    """Why a span's kernel was chosen, and what was measured, the fastest first."""
    if not choice["cpu_us"]:
        return str(choice["reason"])
    times = ", ".join(f"{name} {time_us:.0f}" for name, time_us in sorted(choice["cpu_us"].items(), key=lambda each: each[1]))
    return f"{choice['reason']} (CPU µs of a product: {times}{'; remembered' if choice['remembered'] else ''})"
