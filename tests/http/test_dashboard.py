"""What the page at `/` shows of any status that a node may answer with: its own script, on a stand-in for the browser's page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import to_builtins

from mesh.ids import ModelId, NodeId
from mesh.view import Facts, Load, Loading, ModelCard, Peer, PeerState, Span, View
from node.http import dashboard
from node.ops.status import status
from rag.types import StoreInfo
from routing.loading import BeingLoaded

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no `node` on this machine: the page's script cannot be run")

CARD = ModelCard(ModelId("tiny"), 6, 4096, "w", "n")
NOTHING_TO_SHOW = re.compile(r"undefined|NaN|null|\[object")


def poll(*answers: dict[str, Any] | None) -> dict[str, Any]:
    """What the page shows after each of these answers, and what it asked."""
    assert NODE is not None
    script = re.search(r"<script>(.*?)</script>", dashboard.page(), re.S)
    assert script is not None
    given = json.dumps({"script": script[1], "answers": answers})
    program = Path(__file__).with_name("dashboard_dom.js")
    ran = subprocess.run([NODE, str(program)], input=given, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def shown(body: dict[str, Any]) -> dict[str, Any]:
    page: dict[str, Any] = poll({"status": 200, "body": body})["shown"][0]
    return page


def rows(page: dict[str, Any], table: str) -> list[dict[str, str]]:
    """The cells of a table's rows by their heads."""
    heads, *others = page[table]
    return [{head[0]: cell[0] for head, cell in zip(heads, row)} for row in others]


def peer(number: int, state: PeerState = PeerState.ALIVE, cause: str = "", **facts: Any) -> Peer:
    told = {"http": f"http://10.0.0.{number}:8000", "models": (CARD,), "spans": (Span(CARD.id, 0, 6),), **facts}
    address = (f"10.0.0.{number}", 7946)
    return Peer(NodeId(f"{number:016x}"), f"node-{number}", address, "home", state, cause=cause, facts=Facts(**told))


def seen(*peers: Peer, loading: dict[ModelId, BeingLoaded] | None = None) -> dict[str, Any]:
    """The status as JSON carries it."""
    view = View(peers[0].id, MappingProxyType({each.id: each for each in peers}))
    stores = [StoreInfo("vs_1", "handbook", 0, 3, 3, 4, 2, False)]
    body: dict[str, Any] = to_builtins(status(view, stores, {CARD.id: not loading}, 0.0, None, loading or {}))
    return body


def test_every_kind_of_node_is_shown_without_a_field_that_it_does_not_have() -> None:
    page = shown(
        seen(
            replace(peer(0), load=Load(3, 1, 5, 64)),
            peer(1, PeerState.DEAD, "refused"),
            peer(2, PeerState.LEFT),
            peer(3, PeerState.SUSPECT, "stalled"),
            peer(4, spans=(), intends=(Span(CARD.id, 0, 6),), loading={CARD.id: Loading(43, 12)}),
            peer(5, draining=True),
            replace(peer(6), name="", region="", facts=Facts()),
        )
    )
    assert not NOTHING_TO_SHOW.search(json.dumps(page))
    nodes = {row["name"]: row for row in rows(page, "nodes")}
    assert (nodes["node-0"]["running"], nodes["node-0"]["waiting"], nodes["node-0"]["KV blocks"]) == ("3", "1", "5 / 64")
    for gone in ("node-1", "node-2"):
        assert (nodes[gone]["running"], nodes[gone]["waiting"], nodes[gone]["KV blocks"]) == ("–", "–", "–")
    assert nodes["node-1"]["state"] == "dead (refused)" and nodes["node-3"]["state"] == "suspect (stalled)"
    assert nodes["node-4"]["state"] == "alive, loading 43%" and nodes["node-4"]["layers"] == "–"
    assert nodes["node-5"]["state"] == "alive, draining"
    nameless = nodes[f"{6:016x}"]
    assert (nameless["region"], nameless["http"]) == ("–", "–"), "a node that is heard of and has not told its facts yet"
    assert page["title"] == "mesh, seen from node-0"
    assert rows(page, "stores") == [{"store": "handbook", "documents": "3", "shards": "4", "replicas": "2", "in sync": "no"}]


def test_a_model_that_is_being_loaded_is_shown_with_its_progress() -> None:
    page = shown(seen(peer(0, spans=()), loading={CARD.id: BeingLoaded(((0, 6),), 0.43, 12.0, ("node-0",))}))
    [model] = rows(page, "models")
    assert model["complete"] == "no: loading 43%, 12 s to go"
    assert rows(shown(seen(peer(0))), "models")[0]["complete"] == "yes"


def test_two_sets_of_weights_under_one_id_are_rows_with_their_names_and_hashes() -> None:
    """One that is asked for by its hash is not shown as if it were the other."""
    model = {"id": "m", "layers": 6, "complete": True, "min_replicas": 1}
    answering = {**model, "name": "m", "weights": "a" * 64}
    other = {**model, "name": "m@bbbbbbbb", "weights": "b" * 64}
    shown_rows = rows(shown({"models": [answering, other]}), "models")
    assert [(row["model"], row["weights"]) for row in shown_rows] == [("m", "aaaaaaaa"), ("m@bbbbbbbb", "bbbbbbbb")]


def test_an_empty_mesh_and_a_node_of_another_release_are_shown_too() -> None:
    bare = {"self": {}, "nodes": [{"id": "a", "state": "alive"}], "models": [{"id": "m"}], "stores": [{"name": "s"}]}
    bodies: tuple[dict[str, Any], ...] = ({}, {"self": None, "nodes": None, "models": [], "stores": []}, bare)
    for body in bodies:
        page = shown(body)
        assert not NOTHING_TO_SHOW.search(json.dumps(page)), page
        assert page["state"][1] == "quiet"


values = st.none() | st.integers(-3, 3) | st.text("ab<>&", max_size=3) | st.booleans()
objects = st.dictionaries(
    st.sampled_from(["id", "name", "state", "http", "region", "cause", "load", "spans", "loading", "draining", "layers"]),
    values
    | st.lists(values, max_size=2)
    | st.dictionaries(st.sampled_from(["running", "model", "progress"]), values, max_size=3),
    max_size=6,
)


@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"nodes": st.lists(objects, max_size=4), "models": st.lists(objects, max_size=3)}),
        min_size=20,
        max_size=20,
    )
)
def test_whatever_a_status_lacks_the_page_shows_no_undefined_and_goes_on(bodies: list[dict[str, Any]]) -> None:
    found = poll(*({"status": 200, "body": body} for body in bodies))
    assert len(found["shown"]) == len(bodies)
    for page in found["shown"]:
        assert not NOTHING_TO_SHOW.search(json.dumps(page)), page


def test_a_page_that_needs_a_key_asks_for_it_and_a_node_that_is_gone_is_told() -> None:
    found = poll({"status": 401, "body": {}}, None, {"status": 500, "body": {}}, {"status": 200, "body": seen(peer(0))})
    states = [page["state"] for page in found["shown"]]
    assert [text for text, _ in states[:3]] == ["an API key is needed", "the node does not answer", "the node answered 500"]
    assert [name for _, name in states] == ["no", "no", "no", "quiet"]
    assert [page["key"] for page in found["shown"]] == ["asked", "asked", "", ""]
    assert {url for url, _ in found["asked"]} == {"/mesh/status"}
