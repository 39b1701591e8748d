"""What a person types and sees, against a fake mesh."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.chat import converse
from cli.main import app
from cli.nodes import node_rows
from cli.status import completeness
from mesh.client.answers import AnswerStream
from mesh.keys.keyring import load_keyring
from node.http.auth import ApiKeys
from tests.cli.fake_mesh import FakeMesh, error, fake_mesh, texts


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    with fake_mesh(2) as mesh:
        yield mesh


def mesh_command(*words: str, stdin: str | None = None, **environment: str) -> Result:
    return CliRunner().invoke(app, list(words), input=stdin, env=environment)


def fails(result: Result, *parts: str, code: int = 1) -> None:
    """One line on stderr with all parts, nothing else, no traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_status_shows_nodes_models_and_stores(mesh: FakeMesh) -> None:
    mesh.stores["handbook"] = ["file-1"]
    result = mesh_command("status", "--node", mesh.url(0))
    assert result.exit_code == 0
    for part in (
        "n0",
        "n1",
        mesh.url(1),
        "tiny 0:6",
        "handbook",
        "alive",
        "m 0:6 is computed by mesh-fp32 on avx2",
        "  the first (CPU µs of a product: onednn-fp32 10, mesh-fp32 20; remembered)",
        "without the compiled kernel (no C compiler): half the speed; install one",
        "approximate",
        "m 6:8 is loading for 4 s: packing, 1 of 2 layers, 0.50 of 1.00 GiB",
    ):
        assert part in result.stdout


def test_nodes_shows_round_trips_and_marks_those_that_are_only_estimated() -> None:
    with fake_mesh(4) as mesh:
        mesh.kill(3)
        rows = [line.split() for line in mesh_command("nodes", "--node", mesh.url(0)).stdout.splitlines()]
    assert rows[0][-4:-2] == ["RTT", "MS"]
    assert [row[-3] for row in rows[1:]] == ["-", "1.2", "~80.0", "-"]


def test_a_node_that_loads_and_a_model_that_waits_for_it_are_told_with_progress() -> None:
    load = {"model": "tiny", "start": 0, "end": 6, "progress": 0.43, "eta_s": 12}
    node = {"name": "n0", "id": "0", "state": "alive", "http": "http://x", "readiness": "loading", "loading": [load]}
    assert node_rows({"nodes": [node]})[1][0][1] == "alive, loading 43%"
    assert node_rows({"nodes": [{**node, "readiness": "warm", "loading": []}]})[1][0][1] == "alive"
    model = {"complete": False, "loading": {"progress": 0.43, "eta_s": 12.0}}
    assert completeness(model) == "no: loading 43%, 12 s to go"
    assert completeness({"complete": False, "loading": None}) == "no: layers are missing"
    assert completeness({"complete": True}) == "yes"


def test_the_node_may_come_from_the_environment(mesh: FakeMesh) -> None:
    assert "n1" in mesh_command("nodes", MESH_NODE=mesh.url(0)).stdout


@pytest.mark.parametrize("command", ["status", "nodes", "models"])
def test_every_listing_is_json_on_demand(mesh: FakeMesh, command: str) -> None:
    told = json.loads(mesh_command(command, "--json", "--node", mesh.url(0)).stdout)
    status = mesh.status()
    assert told == (status if command == "status" else status[command])


def test_models_shows_layers_and_replicas(mesh: FakeMesh) -> None:
    assert mesh_command("models", "--node", mesh.url(0)).stdout.split()[-6:] == ["tiny", "9c1d2e3f", "6", "4096", "yes", "2"]


@pytest.mark.parametrize("command", ["status", "models"])
def test_several_sets_of_weights_under_one_id_are_rows_of_their_own_and_said_so(mesh: FakeMesh, command: str) -> None:
    other = {**mesh.status()["models"][0], "name": "tiny@77aa88bb", "weights": "77aa88bb" + "0" * 56, "answers": False}
    mesh.other_versions = [{**other, "nodes": 1, "min_replicas": 1}, {**other, "id": "large", "name": "large", "answers": True}]
    shown = " ".join(mesh_command(command, "--node", mesh.url(0)).stdout.split())
    assert "tiny 9c1d2e3f 6" in shown and "tiny@77aa88bb 77aa88bb 6" in shown
    assert (
        "2 sets of weights are called tiny, and they are no replicas of each other. 9c1d2e3f answers to the name (served by 2)"
    ) in shown
    assert shown.endswith("Ask for another as tiny@77aa88bb (served by 1)"), "and nothing of the model with one set"


def test_status_says_how_far_the_hashing_of_files_is_and_that_weights_are_not_known_yet(mesh: FakeMesh) -> None:
    mesh.hashing = {"large": {"bytes_done": 3 << 30, "bytes": 8 << 30}}
    mesh.other_versions = [{**mesh.status()["models"][0], "id": "large", "name": "large", "weights": "", "complete": False}]
    shown = " ".join(mesh_command("status", "--node", mesh.url(0)).stdout.split())
    assert "the files of large are being hashed: 3.00 of 8.00 GiB" in shown
    assert "large - 6 no: layers are missing" in shown


def test_a_dead_node_is_told_in_one_line() -> None:
    with fake_mesh(1) as mesh:
        url = mesh.url(0)
    fails(mesh_command("status", "--node", url), f"{url}: connection refused", "start one with `mesh up`")


def test_an_address_of_another_form_is_told_in_one_line() -> None:
    fails(mesh_command("status", "--node", "http://here:port"), "expected a node's URL", "http://here:port")


def test_a_node_without_scheme_is_taken_as_http(mesh: FakeMesh) -> None:
    assert mesh_command("nodes", "--node", mesh.url(0).removeprefix("http://")).exit_code == 0


def test_what_a_node_refuses_is_told_in_its_own_words(mesh: FakeMesh) -> None:
    mesh.refusals.append(error(400, "max_tokens: expected at most 4096, got 9999", param="max_tokens"))
    result = mesh_command("chat", "hello", "--max-tokens", "9999", "--node", mesh.url(0))
    fails(result, "max_tokens: expected at most 4096, got 9999")


def test_an_unknown_option_is_a_usage_error() -> None:
    assert mesh_command("status", "--no-such-option").exit_code == 2


def test_chat_streams_one_answer(mesh: FakeMesh) -> None:
    result = mesh_command("chat", "hello", "--seed", "3", "--temperature", "0", "--system", "be brief", "--node", mesh.url(0))
    assert result.stdout == texts(12) + "\n"
    assert mesh.posts("/v1/chat/completions")[0].json() == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "temperature": 0.0,
        "seed": 3,
        "stream": True,
        "max_tokens": 512,
    }


def test_chat_puts_what_is_piped_behind_the_message(mesh: FakeMesh) -> None:
    assert mesh_command("chat", "Sum up:", "--node", mesh.url(0), stdin="a long text").exit_code == 0
    assert mesh.posts("/v1/chat/completions")[0].json()["messages"] == [{"role": "user", "content": "Sum up:\n\na long text"}]


def test_chat_reads_a_piped_message(mesh: FakeMesh) -> None:
    assert mesh_command("chat", "--node", mesh.url(0), stdin="from a pipe\n").stdout == texts(12) + "\n"
    assert mesh.posts("/v1/chat/completions")[0].json()["messages"] == [{"role": "user", "content": "from a pipe\n"}]


def test_chat_with_nothing_to_say_is_told_how(mesh: FakeMesh) -> None:
    fails(mesh_command("chat", "--node", mesh.url(0), stdin=" \n"), "expected a message")


def test_chat_goes_on_when_its_node_is_lost(mesh: FakeMesh) -> None:
    mesh.cut_after = [6]
    result = mesh_command("chat", "hello", "--node", mesh.url(0))
    assert result.stdout == texts(12) + "\n"
    assert "a node was lost on the way" in result.stderr


TOO_LONG = error(400, "the context of tiny is 64 tokens; the prompt has 99", code="context_length_exceeded", param="messages")


def conversation(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, *messages: str | tuple[str, list[Any]], system: str = ""
) -> list[list[str]]:
    """Types the messages, some with answers to refuse the next tries with; the contents of what was sent, try by try."""
    said = iter(messages)

    def typed(prompt: str) -> str:
        message = next(said, None)
        if message is None:
            raise EOFError
        text, refusals = message if isinstance(message, tuple) else (message, [])
        mesh.refusals += refusals
        return text

    monkeypatch.setattr("builtins.input", typed)
    with options.client([mesh.url(0)], None) as client:
        converse(client, [{"role": "system", "content": system}] if system else [], {})
    return [[each["content"] for each in post.json()["messages"]] for post in mesh.posts("/v1/chat/completions")]


def test_a_conversation_repeats_what_was_said_and_outlives_a_failed_answer(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = conversation(mesh, monkeypatch, "one", "", ("refused", [error(400, "not that")]), "two")
    assert sent[-1] == ["one", texts(12), "two"]


def test_a_conversation_beyond_the_context_loses_its_oldest_turns_and_says_so(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = texts(12)
    sent = conversation(mesh, monkeypatch, "one", "two", ("three", [TOO_LONG, TOO_LONG]), "four", system="be brief")
    assert sent[2:] == [
        ["be brief", "one", answer, "two", answer, "three"],
        ["be brief", "two", answer, "three"],
        ["be brief", "three"],
        ["be brief", "three", answer, "four"],
    ], "what the model was told beforehand stays"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "its oldest 4 messages are left out" in told[0]


def test_a_message_that_is_too_long_alone_costs_nothing_of_the_conversation(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = conversation(mesh, monkeypatch, "one", ("too long", [TOO_LONG, TOO_LONG]), "two")
    assert sent[1:] == [["one", texts(12), "too long"], ["too long"], ["one", texts(12), "two"]]
    assert "mesh: this message alone is too long" in capsys.readouterr().err


def test_an_answer_that_is_stopped_before_it_begins_leaves_no_trace(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = iter([True, False])
    texts_of = AnswerStream.texts

    def interrupted(stream: AnswerStream) -> Iterator[str]:
        if next(stopped):
            raise KeyboardInterrupt
        return texts_of(stream)

    monkeypatch.setattr(AnswerStream, "texts", interrupted)
    assert conversation(mesh, monkeypatch, "one", "two") == [["two"]], "the first was never sent, the second has it not before it"


def test_an_answer_that_breaks_off_in_the_middle_leaves_no_trace(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh.fail_after = 3
    sent = conversation(mesh, monkeypatch, "one", "two")
    assert sent == [["one"], ["two"]]


def test_an_answer_cannot_drive_the_terminal(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [
        mesh.chunk("chatcmpl-1", 1, {"content": "a\x1b[2Jb\x9bc\td\x07"}),
        mesh.chunk("chatcmpl-1", 1, {}, finish_reason="stop"),
    ]
    monkeypatch.setattr(mesh, "chunks", lambda stream, after: iter(chunks))
    assert mesh_command("chat", "hello", "--node", mesh.url(0)).stdout == "a[2Jbc\td\n"


def test_ask_lists_what_it_was_answered_from(mesh: FakeMesh) -> None:
    result = mesh_command("ask", "why?", "--store", "s", "--top-k", "2", "--node", mesh.url(0))
    assert f" --node {mesh.url(0)})" in " ".join(result.stderr.split()), "only the node that was asked knows the request"
    assert result.stdout.startswith(texts(12))
    assert "[1] a.md (3-10): a quote" in result.stdout
    assert "only 3 of 4 shards of s answered" in result.stderr
    assert mesh.posts("/v1/chat/completions")[0].json()["mesh"] == {"store": "s", "top_k": 2}


def test_ask_gives_json(mesh: FakeMesh) -> None:
    told = json.loads(mesh_command("ask", "why?", "--store", "s", "--json", "--node", mesh.url(0)).stdout)
    assert told["answer"] == texts(12)
    assert told["citations"][0]["filename"] == "a.md"


def test_documents_are_added_listed_searched_and_removed(mesh: FakeMesh, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "b.bin").write_bytes(b"\0")
    where = ("--store", "s", "--node", mesh.url(0))
    added = mesh_command("docs", "add", str(tmp_path), *where)
    assert "1 added, 1 skipped" in added.stdout
    assert "b.bin: expected text" in added.stderr
    again = json.loads(mesh_command("docs", "add", str(tmp_path), "--json", *where).stdout)
    assert [each["outcome"] for each in again] == ["unchanged", "skipped"]
    assert f"{tmp_path.name}/a.md" in mesh_command("docs", "list", *where).stdout
    assert "s" in mesh_command("docs", "list", "--node", mesh.url(0)).stdout
    assert "a passage" in mesh_command("docs", "search", "what", *where).stdout
    assert "removed 1" in mesh_command("docs", "remove", f"{tmp_path.name}/a.md", *where).stdout
    fails(mesh_command("docs", "remove", f"{tmp_path.name}/a.md", *where), "holds no document")
    fails(mesh_command("docs", "list", "--store", "other", "--node", mesh.url(0)), "there is no store 'other'")


def test_a_path_that_is_not_there_is_told_before_anything_is_sent(mesh: FakeMesh, tmp_path: Path) -> None:
    fails(mesh_command("docs", "add", str(tmp_path / "no.md"), "--store", "s", "--node", mesh.url(0)), "no.md")
    assert mesh.seen == []


def test_why_shows_the_path_and_each_candidate(mesh: FakeMesh) -> None:
    result = mesh_command("why", "req-1", "--node", mesh.url(0))
    for part in (" [0:6]", "COST_MS", "DECODE", "NETWORK", "1.8", "5.0"):
        assert part in result.stdout


def test_a_mesh_key_is_written_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "mesh.key"
    assert mesh_command("key", "new", str(file)).exit_code == 0
    assert len(load_keyring(file).keys[0].secret) == 32
    fails(mesh_command("key", "new", str(file)), "never overwritten")
    printed = tmp_path / "printed.key"
    printed.write_text(mesh_command("key", "new").stdout)
    printed.chmod(0o600)
    assert load_keyring(printed) != load_keyring(file)


def test_an_api_key_is_printed_and_its_hash_is_what_nodes_keep(tmp_path: Path) -> None:
    file = tmp_path / "api.keys"
    keys = [mesh_command("key", "api", "--file", str(file), "--label", label).stdout.strip() for label in ("ann", "ben")]
    known = ApiKeys.parse(file.read_text().splitlines())
    assert len({known.tenant(f"Bearer {key}") for key in keys}) == 2
    assert not any(key in file.read_text() for key in keys)
    assert file.stat().st_mode & 0o077 == 0
