"""What a node reports of itself and the mesh: models, health, readiness, figures, why a request went where it went."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from starlette.requests import Request
from starlette.responses import Response

from mesh.errors import BadRequest
from mesh.ids import ModelId
from mesh.json_object import JsonObject
from mesh.versions import plain_id
from mesh.view import ModelCard
from node.http import dashboard, metrics
from node.http.connection import App
from node.http.errors import RETRY_AFTER_LOADING_S, RETRY_AFTER_NO_PATH_S, loading_fields, retry_headers
from node.http.site import Json, Route, Site


async def list_models(site: Site, request: Request) -> App:
    return Json({"object": "list", "data": [model_object(card) for card in site.node.models()]})


async def get_model(site: Site, request: Request) -> App:
    id = request.path_params["id"]
    name = site.node.named(ModelId(id))
    for card in site.node.models():
        if card.id == name:
            return Json(model_object(card))
    raise BadRequest(f"model: this mesh does not serve {id[:80]!r}", "model", "model_not_found", 404)


def model_object(card: ModelCard) -> JsonObject:
    return {
        "id": card.id,
        "object": "model",
        "created": 0,  # when the weights were made is not known
        "owned_by": "mesh",
        "root": plain_id(card.id, card.weights),
        "max_model_len": card.max_model_len,
        "mesh": {"kind": card.kind, "layers": card.layers, "weights": card.weights, "numerics": card.numerics},
    }


async def health(site: Site, request: Request) -> App:
    return Json({"status": "ok", "node": site.node.me})


async def ready(site: Site, request: Request) -> App:
    """503 names what is missing, by model, so that an operator or a balancer need not guess."""
    reason = await site.node.ready()
    if reason is None:
        return Json({"status": "ready", "node": site.node.me})
    missing = {model: [list(gap) for gap in gaps] for model, gaps in site.node.missing_layers().items()}
    error: JsonObject = {"message": reason, "type": "service_unavailable_error", "param": None, "code": "not_ready"}
    retry_after_s = RETRY_AFTER_NO_PATH_S
    if loads := list(site.node.being_loaded().values()):
        first = min(loads, key=lambda each: each.eta_s)
        error |= {"code": "model_loading", **loading_fields(first.layers, first.progress, first.eta_s)}
        retry_after_s = max(first.eta_s, RETRY_AFTER_LOADING_S)
    headers = {name.decode(): value.decode() for name, value in retry_headers(retry_after_s, site.jitter())}
    return Json({"error": error, "missing_layers": missing}, status_code=503, headers=headers)


async def figures(site: Site, request: Request) -> App:
    text = metrics.render({**site.node.statistics(), "http": site.statistics()})
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})


async def status(site: Site, request: Request) -> App:
    return Json(site.node.status())


async def doctor(site: Site, request: Request) -> App:
    return Json(await site.node.examine())


async def rotate_key(site: Site, request: Request) -> App:
    return Json(await site.node.rotate_key())


async def explain(site: Site, request: Request) -> App:
    id = request.path_params["id"]
    report = site.node.explain(id)
    if report is None:
        raise BadRequest(f"no request {id[:80]!r} is known here", "id", "request_not_found", 404)
    return Json(report)


async def tell_version(site: Site, request: Request) -> App:
    return Json({"version": package_version()})


def package_version() -> str:
    try:
        return version("gossip-mesh")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"


async def page(site: Site, request: Request) -> App:
    return Response(dashboard.page(), media_type="text/html", headers=dashboard.headers())


ROUTES = (
    Route("GET", "/", page, "The dashboard"),
    Route("GET", "/health", health, "The process lives"),
    Route("GET", "/ready", ready, "A token came through a complete path of a model"),
    Route("GET", "/version", tell_version, "The version of the node"),
    Route("GET", "/metrics", figures, "Figures in Prometheus's text form"),
    Route("GET", "/v1/models", list_models, "List models"),
    Route("GET", "/v1/models/{id:path}", get_model, "Tell about a model"),
    Route("GET", "/mesh/status", status, "The mesh as this node sees it"),
    Route("GET", "/mesh/doctor", doctor, "What is wrong with the mesh, and what to do"),
    Route("POST", "/mesh/key/rotate", rotate_key, "Give the mesh a new key"),
    Route("GET", "/mesh/requests/{id}", explain, "Why a request went where it went"),
)
