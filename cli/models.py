"""`mesh models`: what the mesh serves; without a node, what one would serve."""

from __future__ import annotations

from cli import options, output
from cli.status import completeness, several_versions, short_hash
from mesh.json_object import JsonObject


def models(
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """The models of the mesh. With no node named and none on this machine: the default model."""
    from mesh.client.flow import NoNodeAnswers

    try:
        with options.client(node, api_key) as client:
            shown = client.status()["models"]
    except NoNodeAnswers:
        if node:
            raise
        shown = [default_model()]
        output.note(f"no node answers at {options.DEFAULT_NODE}; this is the model that `mesh up` would serve")
    if json:
        output.as_json(shown)
        return
    rows = [
        (
            model.get("name", model["id"]),
            short_hash(model),
            model["layers"],
            model.get("max_model_len", "?"),
            completeness(model),
            model["min_replicas"],
        )
        for model in shown
    ]
    columns = ("MODEL", "WEIGHTS", "LAYERS", "MAX LENGTH", "COMPLETE", "REPLICAS")
    output.table(columns, rows, empty="no models", wraps=("COMPLETE",))
    for line in several_versions(shown):
        output.paragraph(line)


def default_model() -> JsonObject:
    """The default model as `/mesh/status` would report it while no node serves it. Imports no torch."""
    from node.engine.default_model import LAYERS, MAX_MODEL_LEN, MODEL_ID

    return {"id": MODEL_ID, "layers": LAYERS, "max_model_len": MAX_MODEL_LEN, "complete": False, "min_replicas": 0}
