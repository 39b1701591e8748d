"""The client against real sockets: a fake mesh on loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from mesh import AsyncClient, Client
from mesh.client.answers import text_of
from mesh.client.api import DocumentFile, citations
from mesh.client.client import read_documents
from mesh.client.flow import NoNodeAnswers
from mesh.errors import BadRequest, PeerLost, RemoteError
from tests.cli.fake_mesh import CITATION, FakeMesh, error, fake_mesh, texts


def chatted(mesh: FakeMesh, **params: Any) -> tuple[str, Client]:
    with Client([mesh.url(0)]) as client, client.chat("hello", stream=True, **params) as stream:
        return "".join(stream.texts()), client


def test_a_chat_streams_its_text_and_reports_its_statistics() -> None:
    with fake_mesh() as mesh, Client([mesh.url(0)]) as client, client.chat("hello", stream=True, seed=3) as stream:
        assert "".join(stream.texts()) == texts(12)
        assert (stream.id, stream.seq, stream.retries) == ("chatcmpl-1", 12, 0)
        assert stream.mesh["numerics"] == "exact"
        assert stream.progress.usage == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
        assert stream.progress.finish_reasons == {0: "length"}
    sent = mesh.posts("/v1/chat/completions")[0].json()
    assert sent == {"messages": [{"role": "user", "content": "hello"}], "seed": 3, "stream": True}


def test_a_whole_answer_is_the_body_of_the_reply() -> None:
    with fake_mesh() as mesh, Client([mesh.url(0)]) as client:
        reply = client.chat([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert reply["choices"][0]["message"]["content"] == "whole"


@pytest.mark.parametrize("cut_after", [[0], [5], [11], [5, 7, 9], [12]])
def test_a_stream_broken_anywhere_is_resumed_without_a_gap_or_a_repetition(cut_after: list[int]) -> None:
    with fake_mesh(3, cut_after=list(cut_after)) as mesh, Client([mesh.url(0)]) as client:
        with client.chat("hello", stream=True, return_token_ids=True) as stream:
            chunks = list(stream)
    tokens = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids", ())]
    assert tokens == list(range(100, 112))
    assert "".join(text_of(chunk) for chunk in chunks) == texts(12)
    assert sum("role" in choice["delta"] for chunk in chunks for choice in chunk["choices"]) == 1
    assert (stream.progress.missing_tokens, stream.progress.duplicate_tokens) == (0, 0)
    assert sum(choice["finish_reason"] is not None for chunk in chunks for choice in chunk["choices"]) == 1
    assert stream.progress.resumes == len(cut_after)
    asked = [request.node for request in mesh.seen if request.path.startswith("/v1/streams/")]
    assert len(asked) == len(cut_after)
    assert all(earlier != later for earlier, later in zip([0, *asked], asked))


def test_a_stream_that_broke_before_it_had_an_id_is_posted_again() -> None:
    with fake_mesh(cut_before_headers=1) as mesh:
        text, _ = chatted(mesh)
    first, second = mesh.posts("/v1/chat/completions")
    assert text == texts(12)
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert (first.node, second.node) == (0, 1)


def test_where_no_node_can_resume_the_error_has_the_reason() -> None:
    with fake_mesh(cut_after=[4], can_resume=False) as mesh, pytest.raises(PeerLost, match=r"broke after 4 tokens .* ask again"):
        chatted(mesh)


def test_an_error_in_mid_stream_ends_it() -> None:
    with fake_mesh(fail_after=3) as mesh, pytest.raises(RemoteError, match="out of luck"):
        chatted(mesh)


def test_a_token_that_a_resumed_stream_repeats_is_counted_and_dropped() -> None:
    with fake_mesh(cut_after=[4], repeat=True) as mesh, Client([mesh.url(0)]) as client:
        with client.chat("hello", stream=True) as stream:
            assert "".join(stream.texts()) == texts(12)
        assert stream.progress.duplicate_tokens == 1


def test_calls_move_on_when_their_node_dies() -> None:
    with fake_mesh() as mesh, Client([mesh.url(0)]) as client:
        assert client.status()["models"][0]["id"] == "tiny"
        assert client.nodes() == [mesh.url(0), mesh.url(1)]
        mesh.kill(0)
        assert client.models()[0]["id"] == "tiny"
        assert client.live_node() == mesh.url(1)


def test_a_refusal_is_retried_as_the_node_asked() -> None:
    refusals = [error(503, "full", {"retry-after-ms": "1"}), error(429, "slow down", {"retry-after-ms": "1"})]
    with fake_mesh(1, refusals=refusals) as mesh, Client([mesh.url(0)]) as client:
        assert client.chat("hello")["id"] == "chatcmpl-w"
        keys = {request.headers["idempotency-key"] for request in mesh.posts("/v1/chat/completions")}
    assert len(keys) == 1


def test_no_node_at_all_is_an_error_that_names_the_addresses() -> None:
    with fake_mesh(1) as mesh:
        url = mesh.url(0)
    with Client([url]) as client, pytest.raises(NoNodeAnswers, match=f"{url}: connection refused"):
        client.status()


def test_the_api_key_goes_with_every_request() -> None:
    with fake_mesh(1) as mesh, Client([mesh.url(0)], "mk-1") as client:
        client.models()
    assert {request.headers.get("authorization") for request in mesh.seen} == {"Bearer mk-1"}


def test_embeddings_come_in_the_order_of_their_texts() -> None:
    with fake_mesh(1) as mesh, Client([mesh.url(0)]) as client:
        assert client.embed(["a", "bbb", "cc"]) == [[1.0], [3.0], [2.0]]
        assert client.embed("four") == [[4.0]]


def test_a_question_is_answered_with_its_citations() -> None:
    with fake_mesh(1) as mesh, Client([mesh.url(0)]) as client, client.ask("why?", "s", top_k=2, stream=True) as stream:
        assert "".join(stream.texts()) == texts(12)
        assert citations(stream.progress.last or {}) == [CITATION]
    assert mesh.posts("/v1/chat/completions")[0].json()["mesh"] == {"store": "s", "top_k": 2}


def test_documents_are_added_once_replaced_when_changed_and_skipped_when_unreadable(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").write_text("not for the mesh")
    (folder / "a.md").write_text("first")
    (folder / "deep" / "b.md").write_text("second")
    (folder / "image").write_bytes(b"\0\0")
    with fake_mesh(1) as mesh, Client([mesh.url(0)]) as client:
        added = client.docs.add(folder, "s")
        assert [(each.name, each.outcome) for each in added] == [
            ("notes/a.md", "added"),
            ("notes/deep/b.md", "added"),
            ("notes/image", "skipped"),
        ]
        (folder / "a.md").write_text("changed")
        assert [each.outcome for each in client.docs.add(folder, "s")] == ["replaced", "unchanged", "skipped"]
        assert sorted(row["filename"] for row in client.docs.list("s")) == ["notes/a.md", "notes/deep/b.md"]
        assert [store["name"] for store in client.docs.stores()] == ["s"]
        assert client.docs.search("s", "text", top_k=1)[0]["filename"] == "a.md"
        with pytest.raises(BadRequest, match="expected text"):
            client.docs.add(folder / "image", "s")


def test_a_store_of_several_pages_is_listed_and_emptied_by_name() -> None:
    with fake_mesh(1) as mesh, Client([mesh.url(0)]) as client:
        client.docs.add_documents([DocumentFile(f"{number}.md", str(number).encode()) for number in range(5)], "s")
        assert len(client.docs.list("s")) == 5
        assert len(client.docs.remove("s", ["0.md", "3.md"])) == 2
        assert [row["filename"] for row in client.docs.list("s")] == ["1.md", "2.md", "4.md"]
        with pytest.raises(BadRequest, match=r"holds no document '0\.md'"):
            client.docs.remove("s", ["1.md", "0.md"])
        assert len(client.docs.list("s")) == 3  # nothing was removed


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"missing\.md"):
        list(read_documents([tmp_path / "missing.md"]))


def test_the_official_client_is_pointed_at_a_live_node() -> None:
    with fake_mesh() as mesh, Client([mesh.url(0)]) as client:
        client.status()
        mesh.kill(0)
        with client.openai() as official:
            assert isinstance(official, openai.OpenAI)
            assert [model.id for model in official.models.list()] == ["tiny"]
        assert mesh.seen[-1].node == 1


async def test_the_trio_client_does_the_same() -> None:
    with fake_mesh(3, cut_after=[5]) as mesh:
        async with AsyncClient([mesh.url(0)]) as client:
            async with await client.chat("hello", stream=True) as stream:
                text = "".join([text_of(chunk) async for chunk in stream])
            assert text == texts(12)
            assert stream.progress.resumes == 1
            assert (await client.chat("hello"))["id"] == "chatcmpl-w"
            assert await client.embed(["a", "bbb"]) == [[1.0], [3.0]]
            mesh.kill(1)
            assert (await client.models())[0]["id"] == "tiny"
            assert (await client.status())["self"]["id"] == "0" * 16


async def test_the_trio_client_adds_and_removes_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("first")
    with fake_mesh(1) as mesh:
        async with AsyncClient([mesh.url(0)]) as client:
            assert [each.outcome for each in await client.docs.add(tmp_path / "a.md", "s")] == ["added"]
            assert [row["filename"] for row in await client.docs.list("s")] == ["a.md"]
            assert len(await client.docs.remove("s", "a.md")) == 1


async def test_leaving_a_trio_stream_early_closes_its_connection() -> None:
    with fake_mesh(1, tokens=500) as mesh:
        async with AsyncClient([mesh.url(0)]) as client:
            async with await client.chat("hello", stream=True) as stream:
                await anext(stream)
            pool: Any = client._http._transport
            assert not [connection for connection in pool._pool.connections if not connection.is_idle()]


def test_importing_the_package_loads_no_client() -> None:
    probe = "import sys, mesh; assert not {'httpx', 'trio', 'openai'} & set(sys.modules), sys.modules; mesh.Client"
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=Path(__file__).parents[2], timeout=60)
