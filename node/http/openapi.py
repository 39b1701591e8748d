"""`/openapi.json`, made from the route table and the structs that decode the bodies, so it cannot disagree with them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from mesh.json_object import JsonObject
from node.http.site import Route

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
FILE_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string"}},
}


def describe(routes: Iterable[Route], version: str, *, with_keys: bool, open_paths: Iterable[str]) -> JsonObject:
    """The OpenAPI 3.1 document of `routes`."""
    routes = list(routes)
    bodies = [route.body for route in routes if route.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(bodies, schemas))
    paths: dict[str, JsonObject] = {}
    for route in routes:
        path = re.sub(r":\w+\}", "}", route.path)
        operation = _operation(route, path, schema_of.get(route.body) if route.body else None)
        if with_keys and path not in open_paths:
            operation["security"] = [{"key": []}]
        paths.setdefault(path, {})[route.method.lower()] = operation
    described: JsonObject = {
        "openapi": "3.1.0",
        "info": {"title": "mesh node", "version": version},
        "paths": paths,
        "components": {"schemas": {**components, "Error": ERROR_SCHEMA}},
    }
    if with_keys:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return described


def _operation(route: Route, path: str, schema: JsonObject | None) -> JsonObject:
    error = {
        "description": "Refused or failed",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    operation: JsonObject = {
        "operationId": route.endpoint.__name__,
        "summary": route.summary,
        "responses": {"200": {"description": "Done"}, "default": error},
    }
    names = re.findall(r"\{(\w+)\}", path)
    if names:
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    if schema is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif route.multipart:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": FILE_FORM}}}
    return operation
