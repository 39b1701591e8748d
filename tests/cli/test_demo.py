"""The demo's own decisions; `tests/e2e/test_demo.py` runs the demo itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.demo import (
    DemoAnswer,
    DemoFailed,
    Killer,
    ask_once,
    ask_until_quoted,
    compare,
    is_quoted,
    pinned_layers,
    project_documents,
)
from cli.local_mesh import LocalMesh, LocalNode
from cli.output import Story
from mesh.client.client import Client
from node.config import pinned_spans
from tests.cli.fake_mesh import fake_mesh


@given(st.integers(3, 200))
def test_every_layer_is_on_two_nodes_and_no_node_has_all(layers: int) -> None:
    held = []
    for span in pinned_layers(layers):
        spans = pinned_spans(span)
        assert spans
        held.append([layer for start, end in spans for layer in range(start, end)])
    assert sorted(layer for node in held for layer in node) == sorted([*range(layers), *range(layers)])
    assert all(len(set(node)) == len(node) < layers for node in held)


def test_six_layers_are_split_as_documented() -> None:
    assert pinned_layers(6) == ("0:4", "2:6", "0:2,4:6")


def test_two_layers_cannot_be_split_so() -> None:
    with pytest.raises(DemoFailed, match="3 layers or more"):
        pinned_layers(2)


def test_the_documents_are_markdown_with_something_in_it() -> None:
    documents = list(project_documents())
    assert "docs/cli.md" in [document.name for document in documents]
    assert all(document.name.endswith(".md") and document.content.strip() for document in documents)


def test_a_run_keeps_its_tokens_times_and_citations() -> None:
    with fake_mesh(1, cut_after=[5]) as mesh, Client([mesh.url(0)]) as client:
        run = ask_once(client, "What is it?")
    assert run.token_ids == list(range(100, 112))
    assert len(run.times_s) == 12
    assert [citation["filename"] for citation in run.citations] == ["a.md"]
    sent = mesh.posts("/v1/chat/completions")[0].json()
    assert (sent["temperature"], sent["return_token_ids"]) == (0, True)


def test_a_repeated_token_fails_the_demo() -> None:
    with fake_mesh(1, cut_after=[5], repeat=True) as mesh, Client([mesh.url(0)]) as client:
        with pytest.raises(DemoFailed, match="1 duplicate"):
            ask_once(client, "What is it?")


def test_an_answer_quotes_a_passage_word_for_word_or_not() -> None:
    passage = "Every node is alike.\nA node that\ndies loses nothing. It comes back."
    assert is_quoted("A node that dies loses nothing. [2]", passage)
    assert not is_quoted("A node that dies loses everything. [2]", passage)
    assert not is_quoted(" [2]", passage) and not is_quoted("", passage)


def test_an_answer_that_begins_or_ends_inside_a_word_is_no_quote() -> None:
    passage = "What it actually promises: a request goes on over another path (always)."
    assert is_quoted("a request goes on over another path (always). [1]", passage)
    assert not is_quoted("ually promises: a request goes on over another path (always). [1]", passage)
    assert not is_quoted("What it actually promises: a requ [1]", passage)


def test_a_node_is_asked_on_until_an_answer_is_a_sentence_of_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_mesh(1, shards_ok=4) as mesh, Client([mesh.url(0)]) as client:
        node = LocalNode.__new__(LocalNode)
        node.name, node.http = "ada", mesh.url(0)
        runs = ask_until_quoted(Story(), node, iter(("First?", "Second?")), client)
    assert [run.question for run in runs] == ["First?", "Second?"], "what the fake node says is in no passage"
    shown = capsys.readouterr().out
    assert shown.count("A question to ada") == 2 and shown.count("no sentence of the documents") == 2


def run_of(*tokens: int, attempts: int = 2) -> DemoAnswer:
    return DemoAnswer(token_ids=list(tokens), mesh={"attempts": attempts})


def test_only_equal_tokens_after_a_kill_that_hit_are_a_success(tmp_path: Path) -> None:
    with LocalMesh(tmp_path) as mesh, Client(["http://127.0.0.1:1"]) as client:
        entry = LocalNode.__new__(LocalNode)
        killer = Killer(mesh, client, entry, {})
        with pytest.raises(DemoFailed, match="before a node could be killed"):
            compare(run_of(1, 2), run_of(1, 2), killer)
        killer.victim = entry
        compare(run_of(1, 2), run_of(1, 2), killer)
        with pytest.raises(DemoFailed, match="from token 1 on"):
            compare(run_of(1, 2), run_of(1, 3), killer)
        with pytest.raises(DemoFailed, match="from token 1 on"):
            compare(run_of(1, 2), run_of(1), killer)
        with pytest.raises(DemoFailed, match="too late"):
            compare(run_of(1, 2), run_of(1, 2, attempts=1), killer)
