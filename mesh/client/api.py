"""The calls of a client, as flows: the bodies of requests and the contents of answers. No I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from mesh.client.flow import ANSWER_S, LOOK_S, ClientCore, Flow
from mesh.client.params import CHAT_PARAMS, COMPLETION_PARAMS, ChatParams, fields_of
from mesh.errors import BadRequest
from mesh.json_object import JsonObject

ChatMessages = str | Sequence[Mapping[str, object]]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SEARCH_S = 60.0
DOCTOR_S = 20.0  # the node waits for a token and for peers
ROTATE_S = 120.0  # the node waits for every live node


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file to add. `found`: it was found in a folder, so that a type that cannot be read is skipped, not an error."""

    name: str
    content: bytes
    found: bool = False


@dataclass(frozen=True, slots=True)
class DocumentAdded:
    """The result for one document: `outcome` is "added", "replaced" (an older file of that name), "unchanged" or "skipped"."""

    name: str
    outcome: str
    file_id: str = ""
    reason: str = ""


def chat_body(messages: ChatMessages, params: Mapping[str, object]) -> dict[str, object]:
    """Returns the body of a chat completion. A text is one message of the user. Raises TypeError: an unknown parameter."""
    return _chat(messages, fields_of("chat", params, CHAT_PARAMS))


def _chat(messages: ChatMessages, fields: Mapping[str, object]) -> dict[str, object]:
    listed = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(message) for message in messages]
    return {"messages": listed, **fields}


def completion_body(prompt: str | Sequence[int], params: Mapping[str, object]) -> dict[str, object]:
    """Returns the body of a completion. Raises TypeError: an unknown parameter."""
    fields = fields_of("complete", params, COMPLETION_PARAMS)
    return {"prompt": prompt if isinstance(prompt, str) else list(prompt), **fields}


def question_body(question: str, store: str, params: ChatParams) -> dict[str, object]:
    """Returns the body of a question to a store.

    `top_k` of the parameters is the number of passages to retrieve; the sampling parameter `top_k` goes into `extra_body`.

    Raises:
        TypeError: an unknown parameter.
    """
    named = {name: value for name, value in params.items() if name not in ("top_k", "mesh")}
    mesh = {**(params.get("mesh") or {}), "store": store, "top_k": params.get("top_k", 5)}
    return _chat(question, {"mesh": mesh, **fields_of("ask", named, CHAT_PARAMS)})


def encoded(body: Mapping[str, object], *, stream: bool = False) -> bytes:
    """Returns the body as JSON. Raises BadRequest when a parameter is not plain JSON."""
    try:
        return json.dumps({**body, "stream": True} if stream else body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadRequest(f"expected parameters that are plain JSON: {error}") from None


def ask_json(
    caller: ClientCore, method: str, path: str, body: Mapping[str, object] | None = None, silence_s: float = LOOK_S
) -> Flow[JsonObject]:
    """Sends a request with a JSON body, where there is one, and returns the JSON object of the answer."""
    content_type = "application/json" if body is not None else ""
    answer = yield from caller.call(method, path, encoded(body) if body is not None else b"", content_type, silence_s)
    reply: JsonObject = answer.json()
    return reply


def generate(caller: ClientCore, path: str, body: Mapping[str, object]) -> Flow[JsonObject]:
    return (yield from ask_json(caller, "POST", path, body, ANSWER_S))


def status(caller: ClientCore) -> Flow[JsonObject]:
    return (yield from ask_json(caller, "GET", "/mesh/status"))


def models(caller: ClientCore) -> Flow[list[JsonObject]]:
    listing = yield from ask_json(caller, "GET", "/v1/models")
    data: list[JsonObject] = listing["data"]
    return data


def why(caller: ClientCore, request_id: str) -> Flow[JsonObject]:
    return (yield from ask_json(caller, "GET", f"/mesh/requests/{quote(request_id, safe='')}"))


def doctor(caller: ClientCore) -> Flow[JsonObject]:
    return (yield from ask_json(caller, "GET", "/mesh/doctor", silence_s=DOCTOR_S))


def rotate_key(caller: ClientCore) -> Flow[JsonObject]:
    return (yield from ask_json(caller, "POST", "/mesh/key/rotate", silence_s=ROTATE_S))


def live_node(caller: ClientCore) -> Flow[str]:
    """Returns the URL of a node that answers now."""
    answer = yield from caller.call("GET", "/health", silence_s=LOOK_S)
    return answer.node


def embed(caller: ClientCore, texts: Sequence[str], model: str | None) -> Flow[list[list[float]]]:
    body = {"input": list(texts), "encoding_format": "float", **({"model": model} if model else {})}
    reply = yield from ask_json(caller, "POST", "/v1/embeddings", body, SEARCH_S)
    return [row["embedding"] for row in sorted(reply["data"], key=lambda row: row["index"])]


def stores(caller: ClientCore) -> Flow[list[JsonObject]]:
    return (yield from every(caller, "/v1/vector_stores"))


def every(caller: ClientCore, path: str) -> Flow[list[JsonObject]]:
    """Returns all rows of a list that the node sends in pages."""
    rows: list[JsonObject] = []
    after = ""
    while True:
        reply = yield from ask_json(caller, "GET", f"{path}?limit=100{after}", silence_s=SEARCH_S)
        rows += reply["data"]
        if not reply.get("has_more") or not reply["data"]:
            return rows
        after = f"&after={quote(reply['data'][-1]['id'], safe='')}"


def documents(caller: ClientCore, store: str) -> Flow[list[JsonObject]]:
    """Returns the files of a store with their `filename`, which OpenAI's form of the store's list lacks."""
    rows = yield from every(caller, f"/v1/vector_stores/{quote(store, safe='')}/files")
    if any("filename" not in row for row in rows):
        files = yield from every(caller, "/v1/files")
        known = {file["id"]: file for file in files}
        rows = [{**known.get(row["id"], {}), **row} for row in rows]
    return [{**row, "filename": row.get("filename", "")} for row in rows]


def open_store(caller: ClientCore, store: str) -> Flow[None]:
    """Creates the store unless it exists."""
    try:
        yield from ask_json(caller, "GET", f"/v1/vector_stores/{quote(store, safe='')}")
    except BadRequest as error:
        if error.status != 404:
            raise
        yield from ask_json(caller, "POST", "/v1/vector_stores", {"name": store}, SEARCH_S)


def add_document(caller: ClientCore, store: str, document: DocumentFile, held: Mapping[str, str]) -> Flow[DocumentAdded]:
    """Uploads and indexes one document. `held`: file ids of the store's documents, by name.

    A file's id is a digest of its name and bytes, so a document whose id the store has is unchanged.
    """
    body, content_type = multipart(document)
    try:
        file = yield from caller.call("POST", "/v1/files", body, content_type, SEARCH_S)
        file_id = str(file.json()["id"])
        if held.get(document.name) == file_id:
            return DocumentAdded(document.name, "unchanged", file_id)
        path = f"/v1/vector_stores/{quote(store, safe='')}/files"
        attached = yield from ask_json(caller, "POST", path, {"file_id": file_id}, SEARCH_S * 5)
        failure = (attached.get("last_error") or {}).get("message") if attached.get("status") == "failed" else None
        if failure:
            raise BadRequest(f"{document.name}: {failure}", "file")
    except BadRequest as error:
        if document.found and error.status in (400, 413, 415):
            return DocumentAdded(document.name, "skipped", reason=str(error))
        raise
    if older := held.get(document.name):
        yield from ask_json(caller, "DELETE", f"{path}/{older}", silence_s=SEARCH_S)
        return DocumentAdded(document.name, "replaced", file_id)
    return DocumentAdded(document.name, "added", file_id)


def search(caller: ClientCore, store: str, query: str, top_k: int) -> Flow[list[JsonObject]]:
    body = {"query": query, "max_num_results": top_k}
    path = f"/v1/vector_stores/{quote(store, safe='')}/search"
    listing = yield from ask_json(caller, "POST", path, body, SEARCH_S)
    data: list[JsonObject] = listing["data"]
    return data


def remove(caller: ClientCore, store: str, names: Sequence[str]) -> Flow[list[str]]:
    """Removes files, given by name or id, from the store. Returns the removed ids.

    Raises:
        BadRequest: the store has no file of one of the names; then nothing was removed.
    """
    held = yield from documents(caller, store)
    file_ids = []
    for name in names:
        matching = [row["id"] for row in held if name in (row["id"], row["filename"])]
        if not matching:
            raise BadRequest(
                f"store {store} holds no document {name!r}; `mesh docs list --store {store}` names them", "file", status=404
            )
        file_ids += matching
    for file_id in file_ids:
        yield from ask_json(caller, "DELETE", f"/v1/vector_stores/{quote(store, safe='')}/files/{file_id}", silence_s=SEARCH_S)
    return file_ids


def multipart(document: DocumentFile) -> tuple[bytes, str]:
    """Returns the body and content type of an upload as `multipart/form-data` (RFC 7578).

    The boundary is a digest of the content: equal uploads are equal bytes, and the content does not contain it by accident.
    """
    boundary = f"mesh-{hashlib.blake2b(document.content, digest_size=16).hexdigest()}"
    name = document.name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    head = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
        f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
        "content-type: application/octet-stream\r\n\r\n"
    )
    return head.encode() + document.content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def citations(reply: JsonObject) -> list[JsonObject]:
    """Returns the `annotations` of an answer or a chunk, from its `mesh` field and its choices; each once, in order."""
    found = list((reply.get("mesh") or {}).get("annotations") or ())
    for choice in reply.get("choices") or ():
        message = choice.get("message") or choice.get("delta") or {}
        found += [annotation for annotation in message.get("annotations") or () if annotation not in found]
    return found
