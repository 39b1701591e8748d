"""A mesh of HTTP only: real sockets on loopback, scripted answers. What the client and the commands are tested against.

All its nodes share their streams, files and stores, as those of a real mesh do. Token `i` of every answer is
the id `100 + i` with the text `wi `.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Reply = tuple[int, dict[str, str], Any]
CITATION = {
    "type": "file_citation",
    "number": 1,
    "file_id": "file-1",
    "filename": "a.md",
    "quote": "a quote",
    "start": 3,
    "end": 10,
}


def error(status: int, message: str, headers: dict[str, str] | None = None, **fields: Any) -> Reply:
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None, **fields}
    return status, headers or {}, {"error": body}


@dataclass
class Seen:
    """One request as it came."""

    node: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class FakeMesh:
    tokens: int = 12
    can_resume: bool = True
    cut_after: list[int] = field(
        default_factory=list
    )  # each stream in turn: cut the connection after so many tokens, all of them: before [DONE]
    cut_before_headers: int = 0  # so many streams break before they begin
    refusals: list[Reply] = field(default_factory=list)  # answers to the next POSTs
    fail_after: int | None = None  # an error event instead of this token
    repeat: bool = False  # a resumed stream begins one token too early
    shards_ok: int = 3  # of 4, that answer a question to a store
    bodies: dict[str, Any] = field(default_factory=dict)  # by stream
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    stores: dict[str, list[str]] = field(default_factory=dict)
    other_versions: list[dict[str, Any]] = field(default_factory=list)  # rows of `models` beside the first
    hashing: dict[str, dict[str, int]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    servers: list[ThreadingHTTPServer] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)

    def url(self, node: int) -> str:
        return f"http://127.0.0.1:{self.servers[node].server_address[1]}"

    def kill(self, node: int) -> None:
        """From now on the node refuses connections."""
        self.dead.add(node)
        self.servers[node].shutdown()
        self.servers[node].server_close()

    def posts(self, path: str) -> list[Seen]:
        return [request for request in self.seen if request.method == "POST" and request.path == path]

    def status(self) -> dict[str, Any]:
        nodes = [
            {
                "id": f"{index:016x}",
                "name": f"n{index}",
                "state": "dead" if index in self.dead else "alive",
                "http": self.url(index),
                "region": "",
                "spans": [{"model": "tiny", "start": 0, "end": 6}],
                "load": {"running": index, "waiting": 0, "kv_blocks_used": 1, "kv_blocks_total": 8},
                "rtt_ms": [None, 1.25, None][index % 3],
                "rtt_estimate_ms": [None, 9.0, 80.04][index % 3],
                "age_s": 0.0,
            }
            for index in range(len(self.servers))
        ]
        me: dict[str, Any] = {
            **nodes[0],
            "pid": 1,
            "gossip": "127.0.0.1:7946",
            "version": "0.1.0",
            "kernels": {"m 0:6": "mesh-fp32 on avx2"},
        }
        me["hashing"] = self.hashing
        me["uncompiled"] = {"why": "no C compiler", "costs": "half the speed", "do": "install one"}
        me["kernel_choices"] = {
            "m 0:6": dict(portable=True, reason="the first", cpu_us={"mesh-fp32": 20.4, "onednn-fp32": 9.6}, remembered=True)
        }
        me["loading"] = {"m 6:8": dict(phase="packing", layers_done=1, layers=2, bytes_done=1 << 29, bytes=1 << 30, seconds=4.2)}
        model = {"id": "tiny", "layers": 6, "max_model_len": 4096, "complete": True, "min_replicas": len(nodes)}
        model |= {
            "numerics": "approximate",
            "weights": "9c1d2e3f" + "0" * 56,
            "name": "tiny",
            "answers": True,
            "nodes": len(nodes),
        }
        stores = [
            {"name": name, "documents": len(held), "shards": 4, "replicas": 3, "in_sync": True}
            for name, held in self.stores.items()
        ]
        return {"self": me, "nodes": nodes, "models": [model, *self.other_versions], "stores": stores}

    def chunk(self, stream: str, seq: int, delta: dict[str, Any], **choice: Any) -> dict[str, Any]:
        choices = [{"index": 0, "delta": delta, "finish_reason": None, **choice}]
        return {"id": stream, "object": "chat.completion.chunk", "choices": choices, "mesh": {"seq": seq}}

    def chunks(self, stream: str, after: int) -> Iterator[dict[str, Any]]:
        """What a reader with `after` tokens has yet to get."""
        if after == 0:
            yield self.chunk(stream, 0, {"role": "assistant", "content": ""})
        for index in range(after, self.tokens):
            yield self.chunk(stream, index + 1, {"content": f"w{index} "}, token_ids=[100 + index])
        yield self.chunk(stream, self.tokens, {}, finish_reason="length")
        usage = {"prompt_tokens": 5, "completion_tokens": self.tokens, "total_tokens": 5 + self.tokens}
        path = [{"node": "0" * 16, "start": 0, "end": 6}]
        mesh: dict[str, Any] = {"seq": self.tokens, "numerics": "exact", "attempts": 1, "path": path}
        if "mesh" in self.bodies.get(stream, {}):
            mesh |= {"store": "s", "digest": "d", "shards_ok": self.shards_ok, "shards_total": 4, "annotations": [CITATION]}
        yield {"id": stream, "choices": [], "usage": usage, "mesh": mesh}

    def answer(self, request: Seen) -> Reply:
        """Everything but streams."""
        path = urlsplit(request.path).path
        if request.method == "POST" and self.refusals:
            return self.refusals.pop(0)
        match request.method, path.split("/")[1:]:
            case "GET", ["mesh", "status"]:
                return 200, {}, self.status()
            case "GET", ["mesh", "requests", "req-1"]:
                path_0 = [{"node": "n0", "start": 0, "end": 6}]
                candidates = [
                    {"stage": 0, "rank": 0, "node": "n0", "terms_ms": {"decode": 1.25, "network": 0.5}},
                    {"stage": 0, "rank": 1, "node": "n1", "terms_ms": {"decode": 5.0}},
                ]
                why = [{"choice": 0, "attempt": 1, "path": path_0, "cost_ms": 1.75, "candidates": candidates}]
                known = {"id": "chatcmpl-1", "entry": "n0", "state": "done", "seq": 3, "attempts": 1, "why": why}
                return 200, {}, {**known, "path": path_0}
            case "GET", ["health"]:
                return 200, {}, {}
            case "GET", ["v1", "models"]:
                return 200, {}, {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 4096}]}
            case "POST", ["v1", "chat", "completions"]:
                message = {"role": "assistant", "content": "whole", "annotations": []}
                return (
                    200,
                    {},
                    {
                        "id": "chatcmpl-w",
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "mesh": {"seq": 1},
                    },
                )
            case "POST", ["v1", "embeddings"]:
                rows = [{"index": index, "embedding": [float(len(text))]} for index, text in enumerate(request.json()["input"])]
                return 200, {}, {"data": rows[::-1]}
            case method, ["v1", "vector_stores" | "files", *_]:
                return self.documents(method, path, request)
        return error(404, f"there is no {request.method} {path}")

    def documents(self, method: str, path: str, request: Seen) -> Reply:
        parts = [unquote(part) for part in path.split("/")[2:]]
        match method, parts:
            case "POST", ["files"]:
                name = re.search(rb'filename="([^"]*)"', request.body)
                content = re.search(rb"octet-stream\r\n\r\n(.*)\r\n--", request.body, re.DOTALL)
                assert name is not None and content is not None
                if b"\0" in content[1]:
                    return error(400, "expected text", param="file")
                file_id = "file-" + hashlib.sha256(name[1] + content[1]).hexdigest()[:24]
                self.files[file_id] = {"id": file_id, "filename": name[1].decode(), "bytes": len(content[1])}
                return 200, {}, self.files[file_id]
            case "GET", ["files"]:
                return 200, {}, {"data": list(self.files.values())}
            case "POST", ["vector_stores"]:
                self.stores[request.json()["name"]] = []
                return 200, {}, {"id": "vs_1", "name": request.json()["name"]}
            case "GET", ["vector_stores"]:
                rows = [
                    {"id": f"vs_{name}", "name": name, "file_counts": {"total": len(held)}} for name, held in self.stores.items()
                ]
                return 200, {}, {"data": rows}
            case _, ["vector_stores", store, *_] if store not in self.stores:
                return error(404, f"there is no store {store!r}", param="vector_store_id")
            case "GET", ["vector_stores", store]:
                return 200, {}, {"id": f"vs_{store}", "name": store}
            case "GET", ["vector_stores", store, "files"]:
                # Pages of two: as OpenAI's form has it, without file names.
                after = parse_qs(urlsplit(request.path).query).get("after", [""])[0]
                held = self.stores[store]
                begin = held.index(after) + 1 if after else 0
                page = [{"id": file_id, "status": "completed"} for file_id in held[begin : begin + 2]]
                return 200, {}, {"data": page, "has_more": begin + 2 < len(held)}
            case "POST", ["vector_stores", store, "files"]:
                file_id = request.json()["file_id"]
                if file_id not in self.stores[store]:
                    self.stores[store].append(file_id)
                return 200, {}, {"id": file_id, "status": "completed"}
            case "DELETE", ["vector_stores", store, "files", file_id]:
                self.stores[store].remove(file_id)
                return 200, {}, {"id": file_id, "deleted": True}
            case "POST", ["vector_stores", store, "search"]:
                passage = [{"type": "text", "text": "a passage"}]
                return 200, {}, {"data": [{"file_id": "file-1", "filename": "a.md", "score": 0.5, "content": passage}]}
        return error(404, f"there is no {method} {path}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mesh: FakeMesh
    node: int

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        if self.node in self.mesh.dead:  # a kept connection dies with its node
            self._batch()
            return
        length = int(self.headers.get("content-length") or 0)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Seen(self.node, self.command, self.path, headers, self.rfile.read(length))
        self.mesh.seen.append(request)
        url = urlsplit(self.path)
        streamed = url.path.startswith("/v1/streams/") or (
            url.path == "/v1/chat/completions" and request.json().get("stream") and not self.mesh.refusals
        )
        if not streamed:
            self._whole(*self.mesh.answer(request))
        elif url.path.startswith("/v1/streams/"):
            stream = url.path.rpartition("/")[2]
            if not self.mesh.can_resume or stream not in self.mesh.bodies:
                self._whole(*error(404, f"there is no stream {stream}"))
                return
            after = int(parse_qs(url.query).get("starting_after", ["0"])[0])
            self._stream(stream, after - 1 if self.mesh.repeat else after)
        else:
            stream = f"chatcmpl-{len(self.mesh.bodies) + 1}"
            self.mesh.bodies[stream] = request.json()
            if self.mesh.cut_before_headers > 0:
                self.mesh.cut_before_headers -= 1
                self._batch()
                return
            self._stream(stream, 0)

    do_GET = do_POST = do_DELETE = _answer

    def _whole(self, status: int, headers: dict[str, str], body: Any) -> None:
        encoded = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers, "content-length": str(len(encoded))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(encoded)

    def _stream(self, stream: str, after: int) -> None:
        cut_after = self.mesh.cut_after.pop(0) if self.mesh.cut_after else None
        self.send_response(200)
        for name, value in {"content-type": "text/event-stream", "transfer-encoding": "chunked", "x-mesh-stream": stream}.items():
            self.send_header(name, value)
        self.end_headers()
        self._event(": ping\n")
        for chunk in self.mesh.chunks(stream, after):
            seq = chunk["mesh"]["seq"]
            if self.mesh.fail_after is not None and seq > self.mesh.fail_after:
                self._event('data: {"error": {"message": "out of luck", "type": "server_error"}}\n\n')
                self._event("")
                return
            if cut_after is not None and seq > cut_after:
                self._batch()
                return
            self._event(f"data: {json.dumps(chunk)}\n\n")
        if cut_after is not None:
            self._batch()
            return
        self._event("data: [DONE]\n\n")
        self._event("")

    def _event(self, text: str) -> None:
        self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())
        self.wfile.flush()

    def _batch(self) -> None:
        self.close_connection = True


@contextmanager
def fake_mesh(nodes: int = 2, **script: Any) -> Iterator[FakeMesh]:
    """A fake mesh of `nodes` nodes, which are gone when it is left."""
    mesh = FakeMesh(**script)
    threads = []
    try:
        for node in range(nodes):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type(f"Node{node}", (Handler,), {"mesh": mesh, "node": node}))
            server.daemon_threads = True
            mesh.servers.append(server)
            threads.append(Thread(target=server.serve_forever, args=(0.01,), daemon=True))
            threads[-1].start()
        yield mesh
    finally:
        for node in range(len(mesh.servers)):
            if node not in mesh.dead:
                mesh.kill(node)
        for thread in threads:
            thread.join()


def texts(tokens: int) -> str:
    return "".join(f"w{index} " for index in range(tokens))
