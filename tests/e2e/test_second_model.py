"""A model that one node alone was given is listed and answered on every node."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from cli.local_mesh import LocalMesh, LocalNode
from node.engine.default_model import DIRECTORY
from tests.e2e.meshes import answer, get, tokens_of, wait_until

CHAT_PLAIN = {"messages": [{"role": "user", "content": "Tell me of the sea."}], "return_token_ids": True}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def models_of(node: LocalNode) -> dict[str, Any]:
    return {model["id"]: model for model in get(node, "/v1/models").json()["data"]}


def test_every_node_lists_and_answers_for_every_model_of_the_mesh(tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(DIRECTORY, second)
    config = json.loads((second / "generation_config.json").read_text())
    (second / "generation_config.json").write_text(json.dumps({**config, "do_sample": True, "temperature": 1.5}))
    with LocalMesh(tmp_path / "nodes") as mesh:
        a = mesh.start("a", "--model", f"mesh-demo={DIRECTORY}", "--model", str(second), "--layers", "0:6")
        b, c = mesh.start("b", "--layers", "0:6"), mesh.start("c", "--layers", "none")
        wanted = {"mesh-demo", "second", "all-MiniLM-L6-v2"}
        wait_until(lambda: all(set(models_of(node)) == wanted for node in (a, b, c)), "every node lists every model")
        assert {models_of(node)["second"]["max_model_len"] for node in (a, b, c)} == {2048}
        assert get(c, "/v1/models/second").status_code == 200

        asked = {"model": "second", "seed": 7, "max_tokens": 24}
        expected = tokens_of(answer(a, **asked))  # temperature 1.5, as the model's own file says

        def same(node: LocalNode) -> Any:
            reply = httpx.post(node.http + "/v1/chat/completions", json={**CHAT_PLAIN, **asked}, timeout=60)
            return reply.status_code == 200 and reply.json()

        for node in (b, c):
            whole = wait_until(partial(same, node), "the tokenizer has come")
            assert tokens_of(whole) == expected, "its own sampling defaults hold too"
            assert {stage["node"] for stage in whole["mesh"]["path"]} == {get(a, "/health").json()["node"]}
            assert list((tmp_path / "nodes" / node.name / "weights").glob("*/tokenizer.json"))
        with OpenAI(base_url=f"{c.http}/v1", api_key="none") as client:
            chunks = client.completions.create(model="second", prompt="Once", max_tokens=4, stream=True, seed=1)
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

        mesh.kill(a)
        wait_until(lambda: "second" not in models_of(c), "the model has gone with its only holder")
        gone = httpx.post(c.http + "/v1/chat/completions", json={**CHAT_PLAIN, **asked}, timeout=60)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
        assert answer(c, seed=3, max_tokens=5)["model"] == "mesh-demo"
