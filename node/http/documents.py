"""Files, vector stores, search and embeddings, in OpenAI's shapes; `mesh` holds what those have no word for."""

from __future__ import annotations

import math
import struct
from base64 import b64encode

from starlette.requests import Request
from starlette.responses import Response

from mesh.errors import BadRequest
from mesh.json_object import JsonObject
from node.http.connection import App
from node.http.errors import unexpected_field
from node.http.multipart import parse_multipart
from node.http.openai import decode_body
from node.http.schema import AttachBody, EmbeddingBody, RankingOptions, SearchBody, StoreBody
from node.http.site import Json, Route, Site, page_of, read_body, read_json
from rag.types import FileInfo, SearchResult, StoreInfo

MAX_INPUTS = 2048
MAX_RESULTS = 100
MAX_NAME_CHARS = 255


async def embed(site: Site, request: Request) -> App:
    body, _ = decode_body(await read_json(request), EmbeddingBody)
    texts = _embedding_texts(body)
    if body.encoding_format not in (None, "float", "base64"):
        raise unexpected_field("float or base64", body.encoding_format, "encoding_format")
    model = _embedder(site, body.model)
    vectors = await site.node.embed(texts)
    if body.dimensions is not None and vectors and body.dimensions != len(vectors[0]):
        raise unexpected_field(f"the model's own {len(vectors[0])}", body.dimensions, "dimensions")
    as_text = body.encoding_format == "base64"
    rows = [
        {"object": "embedding", "index": index, "embedding": float32_base64(vector) if as_text else vector}
        for index, vector in enumerate(vectors)
    ]
    tokens = await site.node.count_embed_tokens(texts)
    return Json({"object": "list", "data": rows, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def _embedding_texts(body: EmbeddingBody) -> list[str]:
    given = [body.input] if isinstance(body.input, str) else body.input
    if not 1 <= len(given) <= MAX_INPUTS:
        raise BadRequest(f"input: expected 1 to {MAX_INPUTS} texts, got {len(given)}", "input")
    texts = [text for text in given if isinstance(text, str) and text]
    if len(texts) < len(given):
        raise BadRequest("input: expected texts that are not empty; token ids are not supported", "input")
    return texts


def _embedder(site: Site, asked: str | None) -> str:
    embedders = [card.id for card in site.node.models() if card.kind == "embed"]
    if asked in (None, "") and embedders:
        return embedders[0]
    if asked not in embedders:
        known = ", ".join(embedders) or "none on this mesh"
        raise BadRequest(f"model: expected an embedder ({known}), got {str(asked)[:80]!r}", "model", "model_not_found", 404)
    return str(asked)


def float32_base64(vector: list[float]) -> str:
    """Little-endian 32-bit floats in base64: what the official client asks for by default."""
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def upload_file(site: Site, request: Request) -> App:
    content_type = request.headers.get("content-type", "")
    parts = parse_multipart(content_type, await read_body(request))
    fields = {part.name: part.content for part in parts if part.filename is None}
    files = [part for part in parts if part.name == "file"]
    if len(files) != 1:
        raise BadRequest(f"file: expected exactly one, got {len(files)}", "file")
    if "expires_after" in fields or "expires_after[anchor]" in fields:
        raise BadRequest("expires_after: not supported here; delete the file instead", "expires_after")
    name = files[0].filename or ""
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise unexpected_field(f"a file name of 1 to {MAX_NAME_CHARS} printable characters", name, "file")
    return Json(file_object(await site.node.put_file(name, files[0].content)))


async def list_files(site: Site, request: Request) -> App:
    return Json(page_of([file_object(file) for file in await site.node.files()], request))


async def get_file(site: Site, request: Request) -> App:
    file, _ = await site.node.file(request.path_params["id"])
    return Json(file_object(file))


async def file_content(site: Site, request: Request) -> App:
    _, content = await site.node.file(request.path_params["id"])
    headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
    return Response(content, media_type="application/octet-stream", headers=headers)


async def delete_file(site: Site, request: Request) -> App:
    id = request.path_params["id"]
    await site.node.delete_file(id)
    return Json({"id": id, "object": "file", "deleted": True})


async def create_store(site: Site, request: Request) -> App:
    body, fields = decode_body(await read_json(request), StoreBody)
    _refuse(fields, "expires_after", "chunking_strategy")
    if not body.name or len(body.name) > MAX_NAME_CHARS or not body.name.isprintable() or "/" in body.name:
        raise unexpected_field(f"1 to {MAX_NAME_CHARS} printable characters without /", body.name, "name")
    store = await site.node.create_store(body.name)
    for file_id in body.file_ids or ():
        await site.node.attach(store.id, file_id)
    return Json(await _store_object(site, site.node.store(store.id)))


async def list_stores(site: Site, request: Request) -> App:
    return Json(page_of([await _store_object(site, store) for store in site.node.stores()], request))


async def get_store(site: Site, request: Request) -> App:
    return Json(await _store_object(site, site.node.store(request.path_params["store"])))


async def delete_store(site: Site, request: Request) -> App:
    store = site.node.store(request.path_params["store"])
    await site.node.delete_store(store.id)
    return Json({"id": store.id, "object": "vector_store.deleted", "deleted": True})


async def attach(site: Site, request: Request) -> App:
    body, fields = decode_body(await read_json(request), AttachBody)
    _refuse(fields, "chunking_strategy")
    store = site.node.store(request.path_params["store"])
    return Json(store_file_object(store, await site.node.attach(store.id, body.file_id)))


async def list_store_files(site: Site, request: Request) -> App:
    store = site.node.store(request.path_params["store"])
    files = await site.node.store_files(store.id)
    return Json(page_of([store_file_object(store, file) for file in files], request))


async def get_store_file(site: Site, request: Request) -> App:
    store, id = site.node.store(request.path_params["store"]), request.path_params["id"]
    for file in await site.node.store_files(store.id):
        if file.id == id:
            return Json(store_file_object(store, file))
    raise BadRequest(f"no file {id[:80]!r} in store {store.name!r}", "file_id", status=404)


async def detach(site: Site, request: Request) -> App:
    store, id = site.node.store(request.path_params["store"]), request.path_params["id"]
    await site.node.detach(store.id, id)
    return Json({"id": id, "object": "vector_store.file.deleted", "deleted": True})


async def search(site: Site, request: Request) -> App:
    body, fields = decode_body(await read_json(request), SearchBody)
    _refuse(fields, "filters", "rewrite_query")
    queries = [body.query] if isinstance(body.query, str) else body.query
    if len(queries) != 1 or not queries[0].strip():
        raise BadRequest("query: expected one text that is not empty", "query")
    top_k = 10 if body.max_num_results is None else body.max_num_results
    if not 1 <= top_k <= MAX_RESULTS:
        raise unexpected_field(f"a number from 1 to {MAX_RESULTS}", top_k, "max_num_results")
    options = body.ranking_options or RankingOptions()
    embedding_weight, text_weight = _weights(options)
    store = site.node.store(request.path_params["store"])
    result = await site.node.search(store.id, queries[0], top_k, embedding_weight=embedding_weight, text_weight=text_weight)
    return Json(search_page(queries[0], result, options.score_threshold))


def _weights(options: RankingOptions) -> tuple[float, float]:
    if options.hybrid_search is None:
        return 1.0, 1.0
    weights = options.hybrid_search.embedding_weight, options.hybrid_search.text_weight
    param = "ranking_options.hybrid_search"
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights) or not any(weights):
        raise unexpected_field("two weights from 0 up, not both 0", weights, param)
    return weights


def search_page(query: str, result: SearchResult, score_threshold: float | None) -> JsonObject:
    rows = [
        {
            "file_id": passage.file_id,
            "filename": passage.filename,
            "score": passage.score,
            "attributes": {},
            "content": [{"type": "text", "text": passage.text}],
            "mesh": {"start": passage.start, "end": passage.end},
        }
        for passage in result.passages
        if score_threshold is None or passage.score >= score_threshold
    ]
    return {
        "object": "vector_store.search_results.page",
        "search_query": [query],
        "data": rows,
        "has_more": False,
        "next_page": None,
        "mesh": {
            "store": result.store,
            "digest": result.digest,
            "shards_ok": result.shards_ok,
            "shards_total": result.shards_total,
        },
    }


def file_object(file: FileInfo) -> JsonObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at,
        "filename": file.name,
        "purpose": "assistants",
        "status": "processed",
    }


def store_file_object(store: StoreInfo, file: FileInfo) -> JsonObject:
    return {
        "id": file.id,
        "object": "vector_store.file",
        "created_at": file.created_at,
        "vector_store_id": store.id,
        "status": "completed",
        "usage_bytes": file.size_bytes,
        "last_error": None,
        "attributes": {},
        "mesh": {"filename": file.name, "rev": file.rev, "chunks": file.chunks},
    }


async def _store_object(site: Site, store: StoreInfo) -> JsonObject:
    usage_bytes = sum(file.size_bytes for file in await site.node.store_files(store.id))
    counts = {"in_progress": 0, "completed": store.documents, "failed": 0, "cancelled": 0, "total": store.documents}
    return {
        "id": store.id,
        "object": "vector_store",
        "created_at": store.created_at,
        "name": store.name,
        "status": "completed",
        "usage_bytes": usage_bytes,
        "file_counts": counts,
        "last_active_at": None,
        "metadata": {},
        "mesh": {"chunks": store.chunks, "shards": store.shards, "replicas": store.replicas, "in_sync": store.in_sync},
    }


def _refuse(fields: JsonObject, *names: str) -> None:
    for name in names:
        if fields.get(name) not in (None, False, {"type": "auto"}):
            raise BadRequest(f"{name}: not supported here; leave it out", name)


FILES, STORES = "/v1/files", "/v1/vector_stores"
ROUTES = (
    Route("POST", "/v1/embeddings", embed, "Embed texts", EmbeddingBody),
    Route("POST", FILES, upload_file, "Upload a file", multipart=True),
    Route("GET", FILES, list_files, "List files"),
    Route("GET", FILES + "/{id}", get_file, "Tell about a file"),
    Route("DELETE", FILES + "/{id}", delete_file, "Delete a file, out of every store"),
    Route("GET", FILES + "/{id}/content", file_content, "Read a file"),
    Route("POST", STORES, create_store, "Create a store", StoreBody),
    Route("GET", STORES, list_stores, "List stores"),
    Route("GET", STORES + "/{store}", get_store, "Tell about a store"),
    Route("DELETE", STORES + "/{store}", delete_store, "Delete a store"),
    Route("POST", STORES + "/{store}/files", attach, "Index a file in a store", AttachBody),
    Route("GET", STORES + "/{store}/files", list_store_files, "List the files of a store"),
    Route("GET", STORES + "/{store}/files/{id}", get_store_file, "Tell about a file of a store"),
    Route("DELETE", STORES + "/{store}/files/{id}", detach, "Take a file out of a store"),
    Route("POST", STORES + "/{store}/search", search, "Search a store", SearchBody),
)
