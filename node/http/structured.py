"""What a request says its answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs`. Pure.

The older `guided_json`, `guided_regex`, `guided_choice` and `guided_grammar` are the same by other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from mesh.errors import BadRequest
from node.http.errors import unexpected_field
from node.http.schema import GenerationBody, StructuredOutputs
from node.requests import Grammar
from node.text.grammar import MAX_SOURCE_BYTES, check_schema

MAX_CHOICES = 1024  # texts to choose among
ANY_OBJECT = {"type": "object"}
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


def parse_grammar(body: GenerationBody) -> Grammar | None:
    """The one grammar that the request names; None where any text will do.

    Raises:
        BadRequest: more than one, or of another form. Whether it compiles is seen later, by `node.text.grammar`.
    """
    asked = [grammar for grammar in (_response_format(body.response_format), *_extras(body)) if grammar is not None]
    if len(asked) > 1:
        raise BadRequest(f"{asked[1].param}: {asked[0].param} says already what the answer must be", asked[1].param)
    return asked[0] if asked else None


def _response_format(form: Mapping[str, Any] | None) -> Grammar | None:
    match (form or {}).get("type", "text") if form else "text":
        case "text":
            return None
        case "json_object":
            return json_grammar(ANY_OBJECT, "response_format")
        case "json_schema":
            named = (form or {}).get("json_schema")
            if not isinstance(named, dict):
                raise unexpected_field("an object with name and schema", named, "response_format.json_schema")
            schema = named.get("schema", ANY_OBJECT)
            return json_grammar(schema, "response_format.json_schema.schema", lenient=named.get("strict") is not True)
        case other:
            raise unexpected_field("one of text, json_object, json_schema", other, "response_format.type")


def _extras(body: GenerationBody) -> list[Grammar]:
    outputs = body.structured_outputs or StructuredOutputs()
    asked = [(f"structured_outputs.{name}", name, getattr(outputs, name)) for name in StructuredOutputs.__struct_fields__]
    asked += [(old, name, getattr(body, old)) for old, name in GUIDED.items()]
    return [_extra(param, name, value) for param, name, value in asked if value not in (None, False, "", [])]


def _extra(param: str, name: str, value: Any) -> Grammar:
    match name:
        case "json":
            return json_grammar(_read_schema(value, param), param)
        case "json_object":
            return json_grammar(ANY_OBJECT, param)
        case "choice":
            return choice_grammar(value, param)
        case "regex":
            return _text_grammar("regex", value, param)
        case "grammar":
            return _text_grammar("lark", value, param)
        case _:
            raise BadRequest(f"{param}: not supported here; leave it out", param)


def _read_schema(value: Any, param: str) -> Any:
    """A schema may come as an object or as its text."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        raise unexpected_field("a JSON schema", value, param) from None


def json_grammar(schema: Any, param: str, *, lenient: bool = False) -> Grammar:
    """Raises BadRequest: no schema, too large, too deep, or it refers to other documents."""
    if not isinstance(schema, (dict, bool)):
        raise unexpected_field("a JSON schema", schema, param)
    check_schema(schema, param)
    return Grammar("json", _bounded(msgspec.json.encode(schema).decode(), param), lenient=lenient, param=param)


def choice_grammar(choices: Any, param: str) -> Grammar:
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts or not 1 <= len(choices) <= MAX_CHOICES:
        raise unexpected_field(f"1 to {MAX_CHOICES} texts that are not empty", choices, param)
    return Grammar("choice", _bounded(msgspec.json.encode(choices).decode(), param), param=param)


def _text_grammar(kind: Any, value: Any, param: str) -> Grammar:
    if not isinstance(value, str) or not value:
        raise unexpected_field("a text", value, param)
    return Grammar(kind, _bounded(value, param), param=param)


def _bounded(source: str, param: str) -> str:
    if len(source.encode()) > MAX_SOURCE_BYTES:
        raise BadRequest(f"{param}: expected at most {MAX_SOURCE_BYTES} bytes", param)
    return source
