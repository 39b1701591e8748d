"""What a grammar-constrained answer may be, and the bounds within which we compile it. Torch-free.

A `Grammar` travels with its request. The entry compiles it once over bytes, so that one that is wrong or explodes is refused
before anything starts; the last stage compiles it over the model's own tokens (`node.engine.sampling.constraints`). The compiler
and matcher are llguidance's (docs/decisions/0017-grammars.md); every one of its steps is bounded by a count of its own, so a
grammar costs milliseconds or an error, never a hang. What it may not do at all (references that would be fetched) is
refused here by name.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cache
from threading import Lock
from typing import Any

import llguidance
import msgspec

from mesh.errors import BadRequest
from node.requests import Grammar

MAX_SOURCE_BYTES = 64 << 10
MAX_DEPTH = 64  # of a schema's nesting; the compiler recurses over it
REMEMBERED = 256  # grammars known to compile: 16 MiB at most
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=200_000,  # 4 ms by the library's own figures
    step_lexer_fuel=100_000,  # 7 ms a token
    step_max_items=20_000,  # 1 ms a token
    max_lexer_states=16_000,  # 32 MB at most for one sequence, and only for a grammar made to reach it
    max_grammar_size=100_000,
    verbose_errors=False,  # they would tell the answer so far
)
# `oneOf` is taken as `anyOf`: which one it was is not looked at. Whitespace is limited to one space behind each separator: a
# weak model would otherwise fill its answer with newlines.
JSON_SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "coerce_one_of": True}


def source_for_matcher(grammar: Grammar) -> str:
    """The grammar in the matcher's own form.

    Raises:
        BadRequest: what can be seen to be wrong without compiling it.
    """
    if len(grammar.source.encode()) > MAX_SOURCE_BYTES:
        raise BadRequest(f"{grammar.param}: expected at most {MAX_SOURCE_BYTES} bytes of grammar", grammar.param)
    matcher = llguidance.LLMatcher
    match grammar.kind:
        case "json":
            schema = msgspec.json.decode(grammar.source)
            check_schema(schema, grammar.param)
            if not isinstance(schema, dict):
                if schema is not True:
                    raise BadRequest(f"{grammar.param}: no text fits this grammar", grammar.param)
                schema = {}
            schema.pop("x-guidance", None)  # the library's own switches are not the client's
            options: Any = {**JSON_SPACING, "lenient": grammar.lenient}
            return matcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        case "regex":
            return matcher.grammar_from_regex(grammar.source)
        case "choice":
            return matcher.grammar_from_lark("start: " + " | ".join(lark_text(text) for text in json.loads(grammar.source)))
        case "lark":
            return matcher.grammar_from_lark(grammar.source)


def check_schema(schema: object, param: str) -> None:
    """Raises BadRequest for a schema nested too deeply, or with a reference to another document: none is ever fetched."""
    for depth, part in _subschemas(schema):
        if depth > MAX_DEPTH:
            raise BadRequest(f"{param}: expected a schema nested at most {MAX_DEPTH} deep", param)
        reference = part.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise BadRequest(f"{param}: expected references within the schema (#/…), got $ref {reference[:80]!r}", param)


def _subschemas(schema: object) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Every object in a schema with its depth. Not recursive: the depth is a client's."""
    waiting: list[tuple[int, object]] = [(1, schema)]
    while waiting:
        depth, part = waiting.pop()
        if isinstance(part, dict):
            yield depth, part
            waiting += [(depth + 1, below) for below in part.values()]
        elif isinstance(part, list):
            waiting += [(depth + 1, below) for below in part]


def lark_text(text: str) -> str:
    """`text` as a string literal of a Lark grammar."""
    return json.dumps(text)


def compiled(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher at the beginning of an answer (*blocking*, up to a second; not to be moved: copy it).

    Raises:
        BadRequest: it does not compile within the limits, or allows no answer at all.
    """
    matcher = llguidance.LLMatcher(tokenizer, source_for_matcher(grammar), log_level=0, limits=LIMITS)
    first = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        raise BadRequest(f"{grammar.param}: {_reason(matcher.get_error())}", grammar.param)
    if not any(first):
        raise BadRequest(f"{grammar.param}: no text fits this grammar", grammar.param)
    return matcher


def _reason(error: str) -> str:
    """The first lines of the library's message, without the state that it may tell after them."""
    kept = []
    for line in error.splitlines():
        if line.startswith(("<state>", "<non-verbose")):
            break
        kept.append(line.strip())
    reason = " ".join(kept)[:300]
    return "no text fits this grammar" if reason.startswith("NoExtension") else reason or "the grammar does not compile"


@cache
def _bytes_alone() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


class GrammarCheck:
    """Remembers which grammars compile. Any thread."""

    def __init__(self) -> None:
        self._passed: OrderedDict[Grammar, None] = OrderedDict()
        self._lock = Lock()

    def has(self, grammar: Grammar) -> bool:
        with self._lock:
            return grammar in self._passed

    def check(self, grammar: Grammar) -> None:
        """Raises BadRequest, as `compiled` (*blocking*)."""
        if self.has(grammar):
            return
        compiled(grammar, _bytes_alone())
        with self._lock:
            self._passed[grammar] = None
            while len(self._passed) > REMEMBERED:
                self._passed.popitem(last=False)
