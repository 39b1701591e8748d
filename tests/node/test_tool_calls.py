"""Tool calls in text: found in each family's way, the same however the text is cut; forced ones always found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mesh.errors import BadRequest
from mesh.ids import ModelId, StreamId
from mesh.view import ModelCard
from node.engine.sampling.constraints import CompiledGrammars
from node.entry.prompts import Prompt, Prompts
from node.requests import GenerateRequest, Grammar, ToolUse
from node.serving.models import ServedModel, ServedModels
from node.text.grammar import compiled
from node.text.tokenizer import ModelText
from node.text.tool_calls import CallArguments, CallStarted, PlainText, ToolCallParser, ToolEvent, call_id
from node.text.tool_styles import HERMES, LLAMA, MISTRAL, PLAIN, STYLES, ToolStyle, conversation, grammar_for, style_of
from tests.node.found_models import finder

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
F = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
G = {"type": "function", "function": {"name": "g"}}


def parser(style: ToolStyle, most: int = 9) -> ToolCallParser:
    return ToolCallParser(style, frozenset({"f", "g"}), lambda index: f"id{index}", most=most)


def flat(events: list[ToolEvent]) -> list[tuple[str, ...]]:
    """Letter by letter, so that two lists can be compared whatever the pieces were."""
    letters: list[tuple[str, ...]] = []
    for event in events:
        match event:
            case PlainText(text):
                letters += [("said", char) for char in text]
            case CallStarted(index, id, name):
                letters.append(("call", str(index), id, name))
            case CallArguments(index, text):
                letters += [(str(index), char) for char in text]
    return letters


def found(style: ToolStyle, text: str, most: int = 9) -> tuple[str, list[tuple[str, str]]]:
    """The text outside calls, and the calls as (name, arguments)."""
    reading = parser(style, most)
    said = ""
    calls: list[tuple[str, str]] = []
    for event in reading.feed(text) + reading.finish():
        match event:
            case PlainText(more):
                said += more
            case CallStarted(index, _, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, more):
                calls[index] = (calls[index][0], calls[index][1] + more)
    return said, calls


TRICKY = '{"a": "}\\"{ </tool_call> \\\\"}'


@pytest.mark.parametrize(
    ("style", "text", "said", "calls"),
    [
        (HERMES, 'Hm.\n\n<tool_call>\n{"name": "f", "arguments": ' + TRICKY + "}\n</tool_call>\n", "Hm.", [("f", TRICKY)]),
        (HERMES, '<tool_call>{"arguments": {"b": [1, {}]}, "name": "g"}</tool_call>', "", [("g", '{"b": [1, {}]}')]),
        (HERMES, '<tool_call>{"name":"f"}</tool_call><tool_call>{"name":"g"}</tool_call>', "", [("f", "{}"), ("g", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call> Done.', "Done.", [("f", "{}")]),
        (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]', "",
         [("f", '{"a": [1]}'), ("g", "{}")]),
        (MISTRAL, '[TOOL_CALLS]{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        (LLAMA, '\n{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "", [("f", '{"a": 1}'), ("g", "{}")]),
        (PLAIN, '{"type": "function", "name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
    ],
)  # fmt: skip
def test_each_familys_calls_are_found(style: ToolStyle, text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert found(style, text) == (said, calls)


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (HERMES, "a < b <tool_ <tool_calls"),
        (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        (HERMES, "<tool_call>not JSON</tool_call>"),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (HERMES, "  \n"),
        (HERMES, " " * 500 + "x"),
        (MISTRAL, "[TOOL_CALLS] none"),
        (LLAMA, '{"a": 1}'),
        (LLAMA, '{"name": 5}'),
        (PLAIN, 'See {"name": "f", "arguments": {}}'),
        (PLAIN, '{"name": "f'),
    ],
)
def test_what_is_no_call_is_text_to_the_letter(style: ToolStyle, text: str) -> None:
    assert found(style, text) == (text, [])


def test_calls_beyond_the_most_are_dropped_and_not_shown_as_text() -> None:
    text = '<tool_call>{"name":"f"}</tool_call><tool_call>{"name":"g"}</tool_call>'
    assert found(HERMES, text, most=1) == ("", [("f", "{}")])


def test_a_call_is_announced_before_its_arguments_are_whole() -> None:
    reading = parser(HERMES)
    assert reading.feed('<tool_call>\n{"name": "f", "arguments": {"a') == [CallStarted(0, "id0", "f"), CallArguments(0, '{"a')]


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[", "]", "{", "}", '"', "\\", ",", ":", ";", " ", "\n", "x", "<", "null",
     '{"name": "f", "arguments": {"a": "b"}}', '{"name": "g", "parameters": {}}', '"name"', '"arguments"', '"f"']
)  # fmt: skip


@settings(max_examples=150)
@given(style=st.sampled_from(list(STYLES.values())), pieces=st.lists(PIECES, max_size=14), cut=st.integers(0, 60))
def test_what_goes_out_depends_on_the_text_so_far_alone(style: ToolStyle, pieces: list[str], cut: int) -> None:
    text = "".join(pieces)
    whole, slow, early = parser(style), parser(style), parser(style)
    first = whole.feed(text)
    letters = flat(first)
    assert flat([event for char in text for event in slow.feed(char)]) == letters
    before = flat(early.feed(text[:cut]))
    assert letters[: len(before)] == before, "what was out is taken back"
    assert flat(slow.finish()) == flat(whole.finish())
    if not whole.calls:
        assert found(style, text)[0] == text, "no call, and still something is missing"


def test_ids_are_the_same_everywhere_and_apart_from_all_others() -> None:
    assert call_id("s", 0, 1) == call_id("s", 0, 1)
    assert len({call_id(stream, choice, index) for stream in "ab" for choice in (0, 1) for index in (0, 1)}) == 8
    assert len(call_id("s", 0, 0, digits=9)) == 9 and call_id("s", 0, 0, digits=9).isalnum()


# ---- what is forced


def random_answer(grammar: Grammar, seed: int) -> str:
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = compiled(grammar, tokenizer)
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while not matcher.is_stopped() and len(tokens) < 3000:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        tokens.append(int(rng.choice(np.flatnonzero(bits))))
        assert matcher.consume_token(tokens[-1])
    assert matcher.is_stopped(), "a forced call must end"
    return bytes(token for token in tokens if token < 256).decode()


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize(
    ("use", "names", "most"),
    [
        (ToolUse((F, G), "required"), {"f", "g"}, 8),
        (ToolUse((F, G), "required", "f"), {"f"}, 1),
        (ToolUse((F, G), "required", parallel=False), {"f", "g"}, 1),
    ],
)
def test_forced_calls_end_and_are_found_again_with_arguments_that_fit(
    style: ToolStyle, use: ToolUse, names: set[str], most: int
) -> None:
    grammar = grammar_for(use, style, lambda text: None, None)
    assert grammar is not None and grammar.param == "tools"
    for seed in range(3):
        said, calls = found(style, random_answer(grammar, seed))
        assert said == "" and 1 <= len(calls) <= most
        for name, arguments in calls:
            assert name in names
            assert json.loads(arguments) in ([{"a": "x"}, {"a": "y"}] if name == "f" else [{}])


def test_an_offered_function_may_be_called_beside_an_answer_of_a_schema() -> None:
    answer = Grammar("json", '{"enum": [1, 2]}', param="response_format")
    grammar = grammar_for(ToolUse((G,)), HERMES, lambda text: None, answer)
    assert grammar is not None and grammar.param == "response_format"
    answers = {random_answer(grammar, seed)[:11] for seed in range(12)}
    assert answers == {"1", "2", "<tool_call>"}
    assert grammar_for(ToolUse((G,)), HERMES, lambda text: None, None) is None


# ---- templates and tokens


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL),
        ("""{{ tools }}{"name": function name, "parameters": dictionary}""", LLAMA),
        ("""{{ tools }}{"name": NAME, "arguments": OBJECT}""", PLAIN),
        ("{{ messages }}", HERMES),
    ],
)
def test_the_style_is_read_from_the_template(template: str, style: ToolStyle) -> None:
    assert style_of(template) is style


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42", "tool_call_id": "c"},
]


def test_a_template_that_knows_tools_gets_calls_with_arguments_as_objects() -> None:
    told = conversation(TALK, ToolUse((F,)), "{{ tools }}")
    assert told[1]["tool_calls"][0]["function"]["arguments"] == {"a": "x"}
    assert told[2] == TALK[2] and TALK[1]["tool_calls"][0]["function"]["arguments"] == '{"a": "x"}'


def test_a_template_that_knows_none_is_told_in_text() -> None:
    told = conversation(TALK, ToolUse((F,)), "{{ messages }}")
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert '"name": "f"' in told[0]["content"] and "<tool_call>" in told[0]["content"]
    assert found(HERMES, told[2]["content"])[1] == [("f", '{"a": "x"}')]
    assert "42" in told[3]["content"]
    assert conversation(TALK, None, "{{ messages }}")[0]["role"] == "user"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose call marker is one special token, as Mistral's is."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    bytes_alone = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(letters))}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<|end|>")
    directory = tmp_path_factory.mktemp("marked")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    tokenizer.chat_template = "{{ tools }}[TOOL_CALLS]"
    tokenizer.save_pretrained(directory)
    return directory


async def test_an_entry_forces_and_keeps_what_the_models_own_style_needs(spoken: Path) -> None:
    known = ServedModels()
    known.add(ServedModel(ModelCard(ModelId("m"), 4, 500, "w", "n"), spoken, ModelText.load(spoken)))
    talk = ({"role": "user", "content": "?"},)
    prompts = Prompts(finder(known), None)  # type: ignore[arg-type]

    async def prepared(use: ToolUse | None) -> Prompt:
        return await prompts.prepare(GenerateRequest(StreamId("s"), None, messages=talk, tools=use))

    forced = await prepared(ToolUse((G,), "required"))
    assert forced.tool_style == "mistral" and forced.sampling.grammar is not None
    [marker] = forced.markers
    assert forced.decode([marker]) == "[TOOL_CALLS]" and forced.model.text.decode([marker]) == ""
    offered, hidden, plain = [await prepared(use) for use in (ToolUse((G,)), ToolUse((G,), "none"), None)]
    assert offered.tool_style == "mistral" and offered.sampling.grammar is None
    assert offered.tokens == forced.tokens != hidden.tokens == plain.tokens  # the template shows tools where they may be called
    assert hidden.tool_style == "" and not hidden.markers
    with pytest.raises(BadRequest) as refused:
        await prepared(
            ToolUse(({"type": "function", "function": {"name": "g", "strict": True, "parameters": {"not": {}}}},), "required")
        )
    assert refused.value.param == "tools"


def test_a_marker_that_is_a_special_token_is_forced_as_one_and_stays_in_the_text(spoken: Path) -> None:
    text = ModelText.load(spoken)
    marker = text.special_id("[TOOL_CALLS]")
    assert marker is not None and text.special_id("]") is None and text.special_id("") is None
    grammar = grammar_for(ToolUse((G,), "required"), style_of(text.template), text.special_id, None)
    assert grammar is not None
    constraint = CompiledGrammars(spoken, text.vocab_size, frozenset(text.end_tokens)).constraint(grammar)
    answer: list[int] = []
    while not constraint.complete(answer):
        answer.append(int(np.flatnonzero(constraint.allowed(answer))[-1]))
    assert answer[0] == marker
    assert found(MISTRAL, text.decode_with(frozenset({marker}))(answer))[1][0] == ("g", "{}")
    assert "TOOL_CALLS" not in text.decode(answer)
    assert text.decode_with(frozenset())([*text.end_tokens]) == text.decode_with(frozenset({marker}))([*text.end_tokens]) == ""
