"""The product as its users meet it: the openai SDK on every node, documents, placement by itself, API keys."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from cli.local_mesh import LocalMesh, LocalNode
from tests.e2e.meshes import answer, get, idle, ready, start_split, stream, tokens_of, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[LocalNode]]:
    with LocalMesh() as mesh:
        yield start_split(mesh)


def sdk(node: LocalNode) -> openai.OpenAI:
    return openai.OpenAI(base_url=node.http + "/v1", api_key="none", max_retries=0)


def test_the_sdk_chats_with_every_node_streamed_or_not_and_gets_one_answer(nodes: list[LocalNode]) -> None:
    said = []
    for node in nodes:
        with sdk(node) as client:
            asked: dict[str, Any] = {"model": "mesh-demo", "messages": MESSAGES, "seed": 7, "max_tokens": 24, "temperature": 1.5}
            asked["extra_body"] = {"ignore_eos": True}
            whole = client.chat.completions.create(**asked)
            said.append(whole.choices[0].message.content)
            assert whole.usage.completion_tokens == 24
            with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as chunks:
                parts = list(chunks)
            said.append("".join(choice.delta.content or "" for chunk in parts for choice in chunk.choices))
            assert sum(chunk.usage.completion_tokens for chunk in parts if chunk.usage) == 24
            text = client.completions.create(model="mesh-demo", prompt="Once", max_tokens=4, n=2, seed=1)
            assert len(text.choices) == 2
    assert len(set(said)) == 1


def test_the_same_seed_gives_the_same_tokens_from_every_node_alone_or_with_others(nodes: list[LocalNode]) -> None:
    alone = [tokens_of(answer(node, max_tokens=40, seed=3, ignore_eos=True)) for node in nodes]
    with stream(nodes[1], max_tokens=200, seed=1, ignore_eos=True) as (_, others):
        next(others)
        beside = tokens_of(answer(nodes[0], max_tokens=40, seed=3, ignore_eos=True))

    assert alone[0] == alone[1] == alone[2] == beside
    assert tokens_of(answer(nodes[0], max_tokens=40, seed=4, ignore_eos=True)) != alone[0]


def test_a_client_that_hangs_up_frees_its_work_on_all_stages(nodes: list[LocalNode]) -> None:
    with stream(nodes[0], max_tokens=2000, seed=1, ignore_eos=True) as (_, chunks):
        for _ in range(5):
            next(chunks)
    idle(nodes)


def test_bad_requests_are_refused_in_openais_form_and_the_node_stays_up(nodes: list[LocalNode]) -> None:
    with sdk(nodes[0]) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="nonsuch", messages=MESSAGES)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="mesh-demo", prompt="word " * 9000, max_tokens=4)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as hot:
            client.chat.completions.create(model="mesh-demo", messages=MESSAGES, temperature=-1)
        assert hot.value.param == "temperature"
    raw = '{"model": "mesh-demo", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}'
    assert httpx.post(nodes[0].http + "/v1/chat/completions", content=raw).status_code == 400
    large = httpx.post(nodes[0].http + "/v1/chat/completions", content=b" " * (17 << 20))
    assert large.status_code == 413 and large.json()["error"]["message"]
    assert get(nodes[0], "/ready").status_code == 200


def test_documents_added_at_one_node_are_found_and_cited_from_all(nodes: list[LocalNode], tmp_path: Path) -> None:
    (tmp_path / "fox.md").write_text("# Foxes\n\nThe fox in the northern wood sleeps under the old oak during the day.\n")
    (tmp_path / "tax.txt").write_text("The tax office opens at nine and closes at noon on Fridays.\n")
    run = [sys.executable, "-m", "cli", "docs"]
    subprocess.run([*run, "add", str(tmp_path), "--store", "woods", "--node", nodes[0].http], check=True, capture_output=True)
    for node in nodes:
        with sdk(node) as client:
            found = client.vector_stores.search("woods", query="Where does the fox sleep?", max_num_results=2)
            name = next(hit.filename for hit in found)
            assert name.endswith("fox.md")
        cited = httpx.post(
            node.http + "/v1/chat/completions",
            json={"model": "mesh-demo", "messages": MESSAGES, "max_tokens": 8, "mesh": {"store": "woods", "top_k": 2}},
            timeout=60,
        ).json()
        assert cited["mesh"]["shards_ok"] == cited["mesh"]["shards_total"] == 8
        assert cited["choices"][0]["message"]["annotations"]
    removed = subprocess.run([*run, "remove", name, "--store", "woods", "--node", nodes[1].http], capture_output=True, text=True)
    assert removed.returncode == 0, removed.stderr

    def gone() -> bool:
        with sdk(nodes[2]) as client:
            return not any(hit.filename.endswith("fox.md") for hit in client.vector_stores.search("woods", query="fox"))

    wait_until(gone, "the removed document is gone everywhere")


def test_embeddings_and_models_are_the_same_everywhere(nodes: list[LocalNode]) -> None:
    vectors = []
    for node in nodes:
        with sdk(node) as client:
            vectors.append(client.embeddings.create(model="all-MiniLM-L6-v2", input=["a fox", "an oak"]).data[1].embedding)
            assert {model.id for model in client.models.list()} == {"mesh-demo", "all-MiniLM-L6-v2"}
    assert len(vectors[0]) == 384 and vectors[0] == vectors[1] == vectors[2]


def test_the_mesh_shows_itself(nodes: list[LocalNode]) -> None:
    for command in (["status"], ["nodes", "--json"], ["models", "--json"], ["docs", "list", "--store", "woods", "--json"]):
        shown = subprocess.run([sys.executable, "-m", "cli", *command, "--node", nodes[0].http], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
    metrics = get(nodes[0], "/metrics").text
    assert "mesh_entry_counters_tokens_total" in metrics and "vllm:num_requests_running" in metrics
    assert "/mesh/status" in get(nodes[0], "/").text  # the dashboard looks there by itself


def test_nothing_that_a_client_says_is_in_any_log_status_metric_or_file_but_the_documents(
    nodes: list[LocalNode], tmp_path: Path
) -> None:
    said = "xylograph"  # a word of no page, test or log of ours
    messages = [{"role": "user", "content": f"Sell the {said} to nobody."}]
    (tmp_path / "note.md").write_text(f"# A note\n\nThe {said} lies under the stairs.\n")
    added = [sys.executable, "-m", "cli", "docs", "add", str(tmp_path), "--store", "woods", "--node", nodes[0].http]
    subprocess.run(added, check=True, capture_output=True)
    ids = []
    for node in nodes:
        chat = {"model": "mesh-demo", "messages": messages, "max_tokens": 12, "stop": [said], "user": said}
        for change in ({}, {"stream": True}, {"temperature": said}, {"model": said}, {"response_format": {"type": said}}):
            response = httpx.post(node.http + "/v1/chat/completions", json={**chat, **change}, timeout=60)
            assert response.status_code == (404 if "model" in change else 200 if change in ({}, {"stream": True}) else 400)
            ids.append(response.headers["x-request-id"])
        httpx.post(node.http + "/v1/chat/completions", content=f'{{"messages": "{said}', timeout=60)
        embedded = {"model": "all-MiniLM-L6-v2", "input": said}
        assert httpx.post(node.http + "/v1/embeddings", json=embedded, timeout=60).status_code == 200
        with sdk(node) as client:
            client.vector_stores.search("woods", query=f'"{said}" NEAR(', max_num_results=2)

    told: dict[Path | str, str] = {}
    for node in nodes:
        told[node.log] = node.log.read_text()
        assert "node.starting" in told[node.log], "these are the logs"
        for path in ("/metrics", "/mesh/status", "/mesh/doctor", *(f"/mesh/requests/{id}" for id in ids)):
            told[node.http + path] = get(node, path).text
        written = [path for path in node.data_dir.rglob("*") if path.is_file() and "documents" not in path.parts]
        assert written, "the identity at least"
        told |= {path: path.read_bytes().decode(errors="replace") for path in written}
    assert [place for place, text in told.items() if said in text] == []


def test_nodes_that_place_themselves_hold_every_layer_twice(tmp_path: Path) -> None:
    with LocalMesh() as mesh:
        small = ("--layers", "auto", "--memory", "28MiB")  # room for some of the layers, not for all
        placed = mesh.start_all({name: small for name in "abc"})
        ready(placed)
        status = wait_until(
            lambda: (status := get(placed[0], "/mesh/status").json())["models"][0]["min_replicas"] >= 2 and status,
            "every layer twice",
        )
        assert all(sum(span["end"] - span["start"] for span in node["spans"]) < 6 for node in status["nodes"])
