"""What a request may say about the form of its answer, by OpenAI's names and by vLLM's."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from mesh.errors import BadRequest
from mesh.ids import StreamId
from node.http.openai import parse_chat, parse_completion
from node.requests import Grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def grammar(parse: Any = parse_chat, **fields: Any) -> Grammar | None:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if parse is parse_chat else {"prompt": "hi"}
    return parse(msgspec.json.encode({**asked, **fields}), StreamId("x")).generations[0].sampling.grammar  # type: ignore[no-any-return]


def strict(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **more}}


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json", {"type": "object"}),
        ({"response_format": strict(strict=True)}, "json", SCHEMA),
        ({"guided_json": SCHEMA}, "json", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json", SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json", {"type": "object"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"]),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
    ],
)
@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
def test_the_forms_that_name_a_schema_or_choices(fields: Any, kind: str, source: Any, parse: Any) -> None:
    asked = grammar(parse, **fields)
    assert asked is not None and (asked.kind, json.loads(asked.source)) == (kind, source)
    assert asked.param.startswith(next(iter(fields)))


def test_the_forms_that_name_a_text() -> None:
    assert grammar(guided_regex="a+") == Grammar("regex", "a+", param="guided_regex")
    assert grammar(structured_outputs={"regex": "a+"}) == Grammar("regex", "a+", param="structured_outputs.regex")
    assert grammar(structured_outputs={"grammar": 'start: "a"'}) == Grammar(
        "lark", 'start: "a"', param="structured_outputs.grammar"
    )


def test_a_schema_is_kept_to_the_letter_only_when_it_is_strict() -> None:
    leniency = [grammar(response_format=strict(**more)) for more in ({}, {"strict": False}, {"strict": None}, {"strict": True})]
    assert [asked.lenient for asked in leniency if asked is not None] == [True, True, True, False]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": None, "guided_regex": "", "guided_choice": []},
    ],
)
def test_what_asks_for_nothing_constrains_nothing(fields: Any) -> None:
    assert grammar(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format.json_schema.schema"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"$ref": "http://127.0.0.1/s"}}, "guided_json"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 2000}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_json": {"enum": ["a" * 70_000]}}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
    ],
)
def test_other_forms_are_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        grammar(**fields)
    assert refused.value.param is not None and refused.value.param == param
