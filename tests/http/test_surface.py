"""Everything round the generations: who is let in, errors of routing and bodies, figures, the dashboard, the description."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

import pytest
from structlog.testing import capture_logs

from mesh.errors import BadRequest
from mesh.view import Load
from node.http import metrics
from node.http.app import ROUTES
from node.http.auth import OPEN_PATHS, ApiKeys, check_origin, new_api_key
from node.http.site import HttpStatistics
from routing.loading import BeingLoaded
from tests.http.fake_node import CHAT, ME, SPLIT, FakeNode
from tests.http.served import served

QUESTION = {"model": CHAT, "messages": [{"role": "user", "content": "Say hello"}]}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "[::1]", "10.0.0.5:1"]
)
def test_names_of_this_machine_are_let_in(host: str) -> None:
    check_origin(host, None, ("10.0.0.5", 8000))
    check_origin(host, f"http://{host}", ("10.0.0.5", 8000))


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "", "a:b:c", "127.1.evil"],
)
def test_foreign_hosts_and_origins_are_not(host: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_origin(host, None, ("127.0.0.1", 8000))
    assert refused.value.status == 403
    with pytest.raises(BadRequest):
        check_origin("localhost", f"http://{host}", ("127.0.0.1", 8000))


@pytest.mark.parametrize("origin", ["null", "file://", "chrome-extension://abc", "localhost", "http://[::1"])
def test_origins_of_another_kind_are_refused(origin: str) -> None:
    with pytest.raises(BadRequest):
        check_origin("localhost", origin, ("127.0.0.1", 8000))


async def test_a_foreign_page_gets_403_on_every_route() -> None:
    async with served() as site:
        for route in ROUTES:
            path = re.sub(r"\{\w+(:\w+)?\}", "x", route.path)
            reply = await site.ask(route.method, path, b"{}" if route.method == "POST" else None, {"host": "evil.example"})
            assert (reply.status, reply.error["code"]) == (403, "foreign_host"), path
        reply = await site.ask("POST", "/v1/chat/completions", QUESTION, {"origin": "https://evil.example"})
        assert (reply.status, reply.error["code"]) == (403, "foreign_origin")
        assert site.node.requests == []


async def test_with_keys_every_route_wants_one_but_those_of_the_contract() -> None:
    key, line = new_api_key("a test")
    async with served(auth=ApiKeys.parse(["# keys", "", line])) as site:
        for route in ROUTES:
            path = re.sub(r"\{\w+(:\w+)?\}", "x", route.path)
            body = b"{}" if route.method == "POST" else None
            for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": f"Basic {key}"}):
                reply = await site.ask(route.method, path, body, wrong)
                assert (reply.status == 401) == (path not in OPEN_PATHS), path
            right = await site.ask(route.method, path, body, {"authorization": f"Bearer {key}", "host": "any.example"})
            assert right.status not in (401, 403), path
        reply = await site.ask("GET", "/v1/models", headers={"authorization": "Bearer nope"})
        assert reply.error["code"] == "invalid_api_key" and reply.headers["www-authenticate"] == "Bearer"
        await site.ask("POST", "/v1/chat/completions", QUESTION, {"authorization": f"bearer {key}"})
        assert site.node.requests[-1].tenant == hashlib.sha256(key.encode()).hexdigest()[:16]


def test_a_key_file_holds_no_key_and_a_broken_line_is_named_by_number_alone() -> None:
    key, line = new_api_key("laptop\n of mine")
    assert key not in line and "\n" not in line
    assert ApiKeys.parse([line]).labels == {hashlib.sha256(key.encode()).digest(): "laptop of mine"}
    with pytest.raises(BadRequest, match="line 2") as refused:
        ApiKeys.parse([line, "mk-a-key-in-the-clear"])
    assert "clear" not in str(refused.value)
    with pytest.raises(BadRequest, match="at least one"):
        ApiKeys.parse(["# nothing"])


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "param"),
    [
        ("GET", "/nowhere", None, {}, 404, None),
        ("GET", "/v1/models/none", None, {}, 404, "model"),
        ("GET", "/v1/models/", None, {}, 404, "model"),
        ("PUT", "/v1/models", None, {}, 405, None),
        ("GET", "/v1/chat/completions", None, {}, 405, None),
        ("POST", "/v1/chat/completions", None, {}, 411, None),
        ("POST", "/v1/chat/completions", b"{", {}, 400, None),
        ("POST", "/v1/chat/completions", b"[1]", {}, 400, None),
        ("POST", "/v1/chat/completions", b"[" * 100_000, {}, 400, None),
        ("POST", "/v1/chat/completions", b'{"messages": [], "temperature": NaN}', {}, 400, "temperature"),
        ("POST", "/v1/chat/completions", b"\xff\xfe{}", {}, 400, None),
        ("POST", "/v1/chat/completions", QUESTION, {"content-type": "text/plain"}, 415, None),
        ("POST", "/v1/chat/completions", QUESTION, {"content-encoding": "gzip"}, 415, None),
        ("POST", "/v1/embeddings", {"input": []}, {}, 400, "input"),
        ("POST", "/v1/embeddings", {"input": [1, 2]}, {}, 400, "input"),
        ("POST", "/v1/embeddings", {"input": "a", "model": CHAT}, {}, 404, "model"),
        ("POST", "/v1/embeddings", {"input": "a", "dimensions": 99}, {}, 400, "dimensions"),
        ("POST", "/v1/embeddings", {"input": "a", "encoding_format": "int8"}, {}, 400, "encoding_format"),
        ("POST", "/v1/files", b"--b--", {"content-type": "application/json"}, 415, None),
        ("POST", "/v1/files", b"--b--", {"content-type": "multipart/form-data; boundary=b"}, 400, "file"),
        ("GET", "/v1/files?limit=0", None, {}, 400, "limit"),
        ("GET", "/v1/files?after=nothing", None, {}, 400, "after"),
        ("GET", "/v1/files/..%2f..%2fetc", None, {}, 404, None),
        ("POST", "/v1/vector_stores", {}, {}, 400, "name"),
        ("POST", "/v1/vector_stores", {"name": "a", "expires_after": {"days": 1}}, {}, 400, "expires_after"),
        ("POST", "/v1/vector_stores/none/search", {"query": "a"}, {}, 404, "store"),
        ("POST", "/v1/vector_stores/none/search", {"query": "a", "max_num_results": 101}, {}, 400, "max_num_results"),
        ("POST", "/v1/vector_stores/none/search", {"query": "a", "filters": {"type": "eq"}}, {}, 400, "filters"),
        ("GET", "/mesh/requests/none", None, {}, 404, "id"),
    ],
)  # fmt: skip
async def test_what_the_client_gets_wrong_is_named(
    method: str, path: str, body: Any, headers: dict[str, str], status: int, param: str | None
) -> None:
    async with served() as site:
        reply = await site.ask(method, path, body, headers)
        assert (reply.status, reply.error["param"]) == (
            status,
            reply.error["param"] if status == 404 and param is None else param,
        )
        assert reply.headers["x-mesh-node"] == ME and re.fullmatch(r"req_[0-9a-f]{24}", reply.headers["x-request-id"])
        assert len(reply.body) < 65536
        assert site.app.statistics().failures_total == 0


async def test_405_lists_the_methods_of_all_routes_of_the_path() -> None:
    async with served() as site:
        reply = await site.ask("PATCH", "/v1/files")
    assert {name.strip() for name in reply.headers["allow"].split(",")} == {"GET", "HEAD", "POST"}


async def test_an_error_body_stays_small_however_large_the_cause() -> None:
    async with served() as site:
        reply = await site.ask("POST", "/v1/chat/completions", {**QUESTION, "model": "\x01" * 1_000_000})
        long_field = await site.ask("POST", "/v1/chat/completions", {"messages": [{"role": "\x01" * 1_000_000}]})
    assert reply.status == 404 and len(reply.body) < 65536
    assert long_field.status == 400 and len(long_field.body) < 65536


async def test_a_clients_request_id_is_kept_only_if_it_is_harmless() -> None:
    async with served() as site:
        for given, kept in (("a.B-9_", True), ("x" * 200, True), ("x" * 201, False), ("a b", False), ("a<b", False)):
            reply = await site.ask("GET", "/health", headers={"x-request-id": given})
            assert (reply.headers["x-request-id"] == given) is kept


async def test_a_failure_of_ours_says_nothing_of_the_inside() -> None:
    node = FakeNode(failure=RuntimeError("prompt: my secret"))
    async with served(node) as site:
        with capture_logs() as logged:
            reply = await site.ask("GET", "/mesh/status", headers={"x-request-id": "r9"})
        assert site.app.statistics().failures_total == 1
        node.failure = None
        assert (await site.ask("GET", "/mesh/status")).json()["self"]["id"] == ME
    assert reply.status == 500 and b"secret" not in reply.body
    [failure] = logged
    assert (failure["id"], failure["error"]) == ("r9", "RuntimeError") and "secret" not in str(failure)


async def test_ready_names_the_missing_layers() -> None:
    node = FakeNode()
    async with served(node) as site:
        assert (await site.ask("GET", "/ready")).status == 200
        node.not_ready = "no live peer holds layers 2:4 of split-chat"
        reply = await site.ask("GET", "/ready")
        health = await site.ask("GET", "/health")
    assert reply.status == 503 and "2:4" in reply.error["message"]
    assert reply.json()["missing_layers"] == {SPLIT: [[2, 4]]}
    assert reply.headers["retry-after"]
    assert health.status == 200


async def test_ready_tells_what_is_being_loaded_and_how_far_it_is() -> None:
    loads = {SPLIT: BeingLoaded(((2, 4),), 0.5, 9.0, ("b",))}
    async with served(FakeNode(not_ready="layers 2:4 are being loaded", loads=loads)) as site:
        reply = await site.ask("GET", "/ready")
    assert (reply.status, reply.error["code"]) == (503, "model_loading")
    assert (reply.error["progress"], reply.error["layers"], reply.error["eta_s"]) == (0.5, [[2, 4]], 9.0)
    assert 9 <= int(reply.headers["retry-after"]) <= 14


def test_figures_are_a_pure_function_of_the_statistics() -> None:
    http = HttpStatistics(
        requests_total=3, answers_total={"200": 2, "503": 1}, failures_total=0, streams=1, streams_failed_total=0
    )
    text = metrics.render({"http": http, "engine": Load(running=2, waiting=5), "odd-name": {"x": 1, "y": "text"}}).decode()
    lines = text.splitlines()
    assert "mesh_http_requests_total 3.0" in lines
    assert 'mesh_http_answers_total{key="503"} 1.0' in lines
    assert "mesh_http_streams 1.0" in lines and "# TYPE mesh_http_streams gauge" in lines
    assert "vllm:num_requests_running 2.0" in lines and "vllm:num_requests_waiting 5.0" in lines
    assert 'mesh_odd_name{key="x"} 1.0' in lines and "text" not in text.replace("# HELP", "")
    assert metrics.render({"http": http}) == metrics.render({"http": http})


async def test_metrics_are_served_with_those_of_http_itself() -> None:
    async with served() as site:
        await site.ask("GET", "/health")
        reply = await site.ask("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'mesh_http_answers_total{key="200"} 1.0' in reply.body
    assert b"vllm:num_requests_running 0.0" in reply.body


async def test_the_dashboard_runs_its_own_script_and_nothing_else() -> None:
    async with served() as site:
        reply = await site.ask("GET", "/")
    policy, page = reply.headers["content-security-policy"], reply.body.decode()
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        inner = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert inner is not None
        digest = base64.b64encode(hashlib.sha256(inner.group(1).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)=|https?://|innerHTML|style=|onclick", page)


async def test_the_description_lists_every_route_and_resolves() -> None:
    async with served() as site:
        described = (await site.ask("GET", "/openapi.json")).json()
    operations = {(method.upper(), path) for path, item in described["paths"].items() for method in item}
    assert operations == {(route.method, re.sub(r":\w+\}", "}", route.path)) for route in ROUTES}
    schemas = described["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', str(described).replace("'", '"')))
    assert references <= schemas.keys() and "messages" in schemas["ChatBody"]["properties"]


async def test_a_list_is_given_in_pages() -> None:
    node = FakeNode()
    for number in range(5):
        await node.put_file(f"{number}.md", b"x")
    async with served(node) as site:
        first = (await site.ask("GET", "/v1/files?limit=2&order=asc")).json()
        rest = (await site.ask("GET", f"/v1/files?order=asc&after={first['last_id']}")).json()
    assert [item["filename"] for item in first["data"] + rest["data"]] == [f"{number}.md" for number in range(5)]
    assert first["has_more"] and not rest["has_more"]
