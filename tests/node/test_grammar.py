"""Which grammars compile, and that one that explodes is refused quickly, by the name of its field."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import trio

from mesh.errors import BadRequest
from mesh.ids import ModelId, StreamId
from mesh.view import ModelCard
from node.entry.prompts import Prompts
from node.requests import GenerateRequest, Grammar, SamplingParams
from node.serving.models import ServedModel, ServedModels
from node.text.grammar import MAX_DEPTH, GrammarCheck, check_schema
from tests.node.found_models import finder
from tests.node.paths import CountingText

SLOWEST_S = 5.0  # of the compiler's own processor time, on a loaded machine; it takes a second at most on a quiet one


def nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def json_of(schema: Any, **more: Any) -> Grammar:
    return Grammar("json", json.dumps(schema), **more)


COMPILE = {
    "anything": json_of(True),
    "any object": json_of({"type": "object"}),
    "recursion": json_of({"$defs": {"n": {"type": "object", "properties": {"l": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}),
    "one of": json_of({"oneOf": [{"type": "integer"}, {"type": "string"}]}),
    "as deep as may be": json_of(nested(MAX_DEPTH // 2)),
    "unknown words, leniently": json_of({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, lenient=True),
    "regex": Grammar("regex", r"[a-z]+@[a-z]+\.(com|org)"),
    "counted counts": Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "no small automaton": Grammar("regex", "(a|b)*a(a|b){60}"),
    "choices that hold quotes": Grammar("choice", json.dumps(['say "yes"', "line\nbreak", "ü"])),
    "lark": Grammar("lark", 'start: "x" | "(" start ")"'),
}

REFUSED = {
    "too large": json_of({"type": "object", "properties": {f"property-{i}": {"type": "string"} for i in range(2000)}}),
    "a product of unions": json_of(
        {"allOf": [{"anyOf": [{"properties": {f"k{i}_{j}": {"type": "integer"}}} for j in range(6)]} for i in range(12)]}
    ),
    "too many choices": Grammar("regex", "|".join(f"word-{i}-{i * i}" for i in range(4000))),
    "too deep": json_of(nested(MAX_DEPTH + 1)),
    "far too deep": Grammar("json", '{"items":' * 500 + "true" + "}" * 500),
    "itself": json_of({"$ref": "#"}),
    "another document": json_of({"$ref": "https://example.org/schema.json"}),
    "a neighbour": json_of({"type": "object", "properties": {"a": {"$ref": "other.json#/a"}}}),
    "no such type": json_of({"type": "wat"}),
    "unknown words, strictly": json_of({"type": "array", "uniqueItems": True}),
    "nothing fits": json_of(False),
    "no text": Grammar("regex", r"[^\s\S]"),
    "an open group": Grammar("regex", "((a"),
    "looking ahead": Grammar("regex", "a(?=b)"),
    "an endless rule": Grammar("lark", "start: start"),
    "no rules": Grammar("lark", "hello"),
}


@pytest.mark.parametrize("name", COMPILE)
def test_ordinary_grammars_compile(name: str) -> None:
    check = GrammarCheck()
    check.check(COMPILE[name])
    assert check.has(COMPILE[name])


@pytest.mark.parametrize("name", REFUSED)
def test_a_grammar_that_explodes_or_is_wrong_is_refused_by_its_field_and_soon(name: str) -> None:
    check = GrammarCheck()
    began_s = time.thread_time()
    with pytest.raises(BadRequest) as refused:
        check.check(REFUSED[name])
    assert time.thread_time() - began_s < SLOWEST_S
    assert refused.value.param == "response_format" and len(str(refused.value)) < 500
    assert not check.has(REFUSED[name])


def test_a_refusal_does_not_tell_the_grammars_inner_state() -> None:
    with pytest.raises(BadRequest) as refused:
        GrammarCheck().check(Grammar("lark", "start: start"))
    assert str(refused.value) == "response_format: no text fits this grammar"


def test_the_check_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.text.grammar.REMEMBERED", 2)
    check = GrammarCheck()
    grammars = [Grammar("regex", text) for text in "abc"]
    for grammar in grammars:
        check.check(grammar)
    assert [check.has(grammar) for grammar in grammars] == [False, True, True]


def test_a_property_may_be_called_like_a_keyword() -> None:
    check_schema({"properties": {"$ref": {"type": "string"}}}, "response_format")


def prompts() -> Prompts:
    class Text(CountingText):
        end_tokens = (2,)
        longest_token = 1
        sampling_defaults: dict[str, float] = {}  # noqa: RUF012

        def encode(self, text: str) -> tuple[int, ...]:
            return tuple(text.encode())

    models = ServedModels()
    models.add(ServedModel(ModelCard(ModelId("m"), 4, 100, "w", "n"), None, Text()))  # type: ignore[arg-type]
    return Prompts(finder(models), None)  # type: ignore[arg-type]


def asking(grammar: Grammar) -> GenerateRequest:
    return GenerateRequest(StreamId("s"), None, prompt="hi", sampling=SamplingParams(grammar=grammar))


async def test_a_bad_grammar_is_refused_before_anything_starts_and_a_good_one_goes_to_the_last_stage_alone() -> None:
    ready = prompts()
    with pytest.raises(BadRequest, match="response_format"):
        await ready.prepare(asking(REFUSED["no text"]))
    prompt = await ready.prepare(asking(COMPILE["regex"]))
    assert prompt.stage_sampling(1, last=True).grammar == COMPILE["regex"]
    assert prompt.stage_sampling(1, last=False).grammar is None
    assert prompt.stage_sampling(1, last=False).seed == prompt.choice_sampling(1).seed


async def test_a_grammar_that_takes_too_long_is_refused_and_does_not_hold_the_node_up(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = trio.CapacityLimiter(1)
    slow.acquire_on_behalf_of_nowait("a grammar that is being compiled")
    ready = prompts()
    monkeypatch.setattr(ready, "_compiling", slow)
    with pytest.raises(BadRequest, match="took more than 5 s to compile"):
        await ready.prepare(asking(COMPILE["regex"]))
    assert 5 <= trio.current_time() < 6
