"""Real nodes that were given other weights under one name: never replicas of each other, one version answers, all say so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.local_mesh import LocalMesh, LocalNode
from node.engine.default_model import DIRECTORY, MODEL_ID
from node.weights.record import RECORD
from tests.e2e.meshes import answer, get, new_tokens, stream, tokens_of, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def copy_of_the_model(folder: Path) -> Path:
    copy = folder / "copy"
    shutil.copytree(DIRECTORY, copy, ignore=shutil.ignore_patterns(RECORD))
    return copy


def flip_unseen(path: Path) -> None:
    """One other byte in the middle of the weights; size, time and inode as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rows(node: LocalNode) -> list[dict[str, Any]]:
    return list(get(node, "/mesh/status").json()["models"])


def counted(node: LocalNode) -> list[tuple[str, int, bool]]:
    """Name, copies and whether it is complete, of each set of weights."""
    return [(row["name"], row["min_replicas"], row["complete"]) for row in rows(node)]


def all_count(nodes: list[LocalNode], *copies: int) -> None:
    """Until all nodes see the one model in so many versions, with so many copies, the answering one first."""

    def seen() -> bool:
        told = [counted(node) for node in nodes]
        return all([each[1] for each in rows_of] == list(copies) and all(each[2] for each in rows_of) for rows_of in told)

    wait_until(seen, f"every node counts {copies} copies", timeout_s=60)


def test_nodes_with_other_weights_under_one_name_are_no_replicas_and_one_version_answers(tmp_path: Path) -> None:
    copy = copy_of_the_model(tmp_path)
    with LocalMesh(tmp_path / "mesh") as mesh:
        a, b, c = mesh.start_all({"a": (), "b": (), "c": ("--model", f"{MODEL_ID}={copy}")})
        all_count([a, b, c], 3)
        expected = tokens_of(answer(a, seed=3, max_tokens=24))
        right = rows(a)[0]["weights"]
        assert mesh.stop(c) == 0
        flip_unseen(copy / "model.safetensors")
        assert (copy / RECORD).is_file(), "it was hashed at the first start, and looks the same"
        c = mesh.start("c", "--model", f"{MODEL_ID}={copy}", join=[a])

        all_count([a, b, c], 2, 1)
        assert "weights.changed" in c.log.read_text() and "weights.other_version" in c.log.read_text()
        told = [rows(node) for node in (a, b, c)]
        assert [(row["id"], row["name"], row["weights"]) for row in told[0]] == [
            (MODEL_ID, MODEL_ID, right),
            (MODEL_ID, f"{MODEL_ID}@{told[0][1]['weights'][:8]}", told[0][1]["weights"]),
        ]
        assert len({str([(row["weights"], row["answers"]) for row in each]) for each in told}) == 1, "all nodes say the same"
        other = told[0][1]["name"]

        for number, entry in enumerate((a, b, c)):
            whole = answer(entry, seed=3, max_tokens=24)
            assert tokens_of(whole) == expected and whole["model"] == MODEL_ID
            assert c_is_not_on(whole, c), f"entry {number}"
        asked = answer(a, seed=3, max_tokens=4, model=other)
        assert [stage["node"] for stage in asked["mesh"]["path"]] == [node_id(c)] and asked["model"] == other
        assert asked["system_fingerprint"] != answer(b, seed=3, max_tokens=4)["system_fingerprint"]
        for node in (a, b, c):
            listed = {card["id"]: card for card in get(node, "/v1/models").json()["data"] if card["mesh"]["kind"] == "chat"}
            assert {name: (card["root"], card["mesh"]["weights"]) for name, card in listed.items()} == {
                row["name"]: (MODEL_ID, row["weights"]) for row in told[0]
            }
            findings = get(node, "/mesh/doctor").json()["findings"]
            assert any("2 sets of weights are called mesh-demo" in finding["what"] for finding in findings)
        refused = httpx.post(a.http + "/v1/completions", json={"model": f"{MODEL_ID}@00000000", "prompt": "x"}, timeout=30)
        assert refused.status_code == 404 and other in refused.text


def test_a_stream_whose_node_dies_goes_on_with_the_same_weights_though_others_answer_by_then(tmp_path: Path) -> None:
    copy = copy_of_the_model(tmp_path)
    flip_unseen(copy / "model.safetensors")
    os.utime(copy / "model.safetensors")  # the newer of the two
    with LocalMesh(tmp_path / "mesh") as mesh:
        a, b, c = mesh.start_all({"a": (), "b": (), "c": ("--model", f"{MODEL_ID}={copy}")})
        all_count([a, b, c], 2, 1)
        expected = tokens_of(answer(a, seed=5, max_tokens=400, ignore_eos=True))
        ids = {node_id(node): node for node in (a, b)}
        got: list[int] = []
        killed = None
        with stream(c, seed=5, max_tokens=400, ignore_eos=True) as (stream_id, chunks):
            for chunk in chunks:
                got += new_tokens(chunk)
                if killed is None and len(got) >= 5:
                    [stage] = get(c, f"/mesh/requests/{stream_id}").json()["path"]
                    killed = ids[stage["node"]]
                    mesh.kill(killed)
        assert got == expected
        why = get(c, f"/mesh/requests/{stream_id}").json()
        survivor = b if killed is a else a
        assert why["path"] == [{"node": node_id(survivor), "start": 0, "end": 6}] and why["attempts"] == 2
        assert len({plan["weights"] for plan in why["why"]}) == 1

        wait_until(lambda: rows(c)[0]["weights"] != why["why"][0]["weights"], "of one node each, the newer weights answer")
        wait_until(lambda: rows(survivor)[0]["weights"] == rows(c)[0]["weights"], "on every node")
        whole = answer(survivor, seed=5, max_tokens=4)
        assert [stage["node"] for stage in whole["mesh"]["path"]] == [node_id(c)], "a new request goes to what answers now"


def node_id(node: LocalNode) -> str:
    return str(get(node, "/mesh/status").json()["self"]["id"])


def c_is_not_on(whole: dict[str, Any], c: LocalNode) -> bool:
    return node_id(c) not in [stage["node"] for stage in whole["mesh"]["path"]]
