"""An unknown keyword argument raises TypeError, with the nearest known name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mesh import AsyncClient, Client
from mesh.client.api import chat_body, completion_body, question_body
from mesh.client.params import CHAT_PARAMS, COMPLETION_PARAMS, EXTRA
from node.http.openai import UNSUPPORTED
from node.http.schema import ChatBody, CompletionBody
from tests.cli.fake_mesh import fake_mesh


def fields(kind: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind)}


def test_the_known_names_are_those_that_a_node_reads_or_refuses() -> None:
    assert {*CHAT_PARAMS} == {*fields(ChatBody), *UNSUPPORTED, EXTRA} - {"messages", "stream"}
    assert {*COMPLETION_PARAMS} == {*fields(CompletionBody), *UNSUPPORTED, EXTRA} - {"prompt", "stream"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tempurature", "temperature"), ("max_token", "max_tokens"), ("topk", "top_k"), ("Seed", "seed"), ("qqq", None)],
)
def test_a_misspelt_parameter_is_a_type_error_that_names_the_right_one(name: str, meant: str | None) -> None:
    params: Any = {name: 1}
    with Client(["http://127.0.0.1:1"]) as client:
        for method, call in (
            ("chat", lambda: client.chat("x", **params)),
            ("chat", lambda: client.chat("x", stream=True, **params)),
            ("ask", lambda: client.ask("x", "store", **params)),
            ("complete", lambda: client.complete("x", **params)),
        ):
            with pytest.raises(TypeError, match=rf"^{method}\(\) got an unexpected keyword argument '{name}'") as refused:
                call()
            assert (f"did you mean '{meant}'?" in str(refused.value)) == (meant is not None)
            assert "extra_body={…}" in str(refused.value)


async def test_the_trio_client_refuses_the_same() -> None:
    params: Any = {"tempurature": 1}
    async with AsyncClient(["http://127.0.0.1:1"]) as client:
        for call in (client.chat("x", **params), client.ask("x", "store", **params), client.complete("x", stream=True, **params)):
            with pytest.raises(TypeError, match="did you mean 'temperature'"):
                await call


def test_what_one_kind_of_answer_does_not_know_is_refused_there() -> None:
    with pytest.raises(TypeError, match=r"complete.*'tools'"):
        completion_body("x", {"tools": []})


def test_extra_fields_are_sent_as_they_are_and_win() -> None:
    with fake_mesh(1) as mesh, Client([mesh.url(0)]) as client:
        client.chat("x", seed=1, extra_body={"seed": 2, "of_a_later_release": [1]})
    sent = mesh.posts("/v1/chat/completions")[0].json()
    assert (sent["seed"], sent["of_a_later_release"]) == (2, [1]) and EXTRA not in sent
    assert chat_body("x", {EXTRA: None}) == chat_body("x", {})
    wrong: Any = [1]
    with pytest.raises(TypeError, match="extra_body to be a mapping"):
        chat_body("x", {EXTRA: wrong})


def test_a_question_keeps_its_store_whatever_else_the_mesh_is_asked_for() -> None:
    body = question_body("why?", "s", {"top_k": 2, "mesh": {"policy": "mesh", "deadline_s": 9.0}, EXTRA: {"top_k": 40}})
    assert body["mesh"] == {"store": "s", "top_k": 2, "policy": "mesh", "deadline_s": 9.0}
    assert body["top_k"] == 40, "the sampling parameter"
