"""What a request leaves unset is the model's to say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mesh.errors import BadRequest
from mesh.ids import ModelId, StreamId
from mesh.view import ModelCard
from node.config import NodeConfig
from node.engine.default_model import DIRECTORY
from node.entry.prompts import Prompts
from node.http.openai import parse_chat
from node.requests import GenerateRequest, SamplingParams
from node.serving.models import ServedModel, ServedModels
from node.text.sampling_defaults import FILE, RANGES, end_tokens, generation_config, sampling_defaults, settled
from node.text.tokenizer import ModelText
from tests.node.found_models import finder

SAID = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}


def write(directory: Path, said: object) -> Path:
    (directory / FILE).write_text(said if isinstance(said, str) else json.dumps(said))
    return directory


def defaults_of(directory: Path) -> dict[str, float | int]:
    return sampling_defaults(generation_config(directory), "m")


def test_a_models_file_sets_the_fields_that_it_names_and_no_others(tmp_path: Path) -> None:
    assert defaults_of(tmp_path) == {}, "most models have no such file"
    assert defaults_of(write(tmp_path, {**SAID, "do_sample": True, "max_new_tokens": 9, "eos_token_id": [1, 2]})) == SAID
    assert defaults_of(write(tmp_path, {"top_k": -1, "temperature": 0, "top_p": None})) == {"top_k": 0, "temperature": 0.0}


def test_a_model_that_does_not_sample_is_greedy_unless_the_client_names_a_temperature() -> None:
    greedy = sampling_defaults({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, "m")
    assert greedy == {"temperature": 0.0, "top_p": 0.9}, "as in transformers, its temperature counts only where it samples"
    assert settled(SamplingParams(), {"temperature", "top_p"}, greedy).temperature == 0.0
    asked = settled(SamplingParams(temperature=0.7), {"top_p"}, greedy)
    assert (asked.temperature, asked.top_p) == (0.7, 0.9)
    assert sampling_defaults({}, "m") == sampling_defaults({"do_sample": None}, "m") == {}, "left open"


def test_the_default_model_is_greedy() -> None:
    assert sampling_defaults(generation_config(DIRECTORY), "mesh-demo") == {"temperature": 0.0}


@pytest.mark.parametrize("value", [0, 1, "false", []])
def test_do_sample_that_is_no_boolean_is_passed_over_and_told(value: object) -> None:
    with capture_logs() as logs:
        assert sampling_defaults({"do_sample": value}, "m") == {}
    assert [(entry["event"], entry["field"]) for entry in logs] == [("generation_config.ignored", "do_sample")]


def test_fields_that_would_change_answers_and_are_not_followed_are_told() -> None:
    neutral = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "max_new_tokens": 9}
    with capture_logs() as logs:
        sampling_defaults(neutral, "m")
        assert not logs
        sampling_defaults({**neutral, "num_beams": 4, "suppress_tokens": [7]}, "m")
    assert [(entry["event"], entry["fields"]) for entry in logs] == [
        ("generation_config.not_followed", ["num_beams", "suppress_tokens"])
    ]


@pytest.mark.parametrize(
    ("said", "ends"),
    [(None, ()), (2, (2,)), ([2, 0], (2, 0)), ("2", ()), (True, ()), ([2, -1, None, "x", 5], (2, 5)), ({}, ())],
)
def test_end_tokens_are_one_id_or_a_list_of_them(said: object, ends: tuple[int, ...]) -> None:
    assert end_tokens({"eos_token_id": said}) == ends


@pytest.mark.parametrize("said", ["{", "[1]", {"eos_token_id": "no number"}, {"early_stopping": "no such way"}])
def test_a_damaged_file_does_not_stop_the_models_tokenizer_from_loading(said: object, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((DIRECTORY / file).read_bytes())
    write(tmp_path, said)
    assert ModelText.load(tmp_path).end_tokens == (2,), "the tokenizer's own"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in RANGES for value in ("1", True, [1], -2, 1e10, float("nan"))),
        ("top_p", 0),
        ("repetition_penalty", 0),
        ("top_k", 2.5),
    ],
)
def test_a_value_that_no_request_could_have_is_passed_over_and_told(name: str, value: object, tmp_path: Path) -> None:
    kept = next(other for other in SAID if other != name)
    with capture_logs() as logs:
        assert defaults_of(write(tmp_path, {name: value, kept: SAID[kept]})) == {kept: SAID[kept]}
    assert [(entry["event"], entry["field"]) for entry in logs] == [("generation_config.ignored", name)]


@pytest.mark.parametrize("said", ["{", "[1]", '"x"', "\x00", " " * (1 << 21)])
def test_a_file_that_is_none_is_passed_over_and_told(said: str, tmp_path: Path) -> None:
    with capture_logs() as logs:
        assert defaults_of(write(tmp_path, said)) == {}
    assert [entry["event"] for entry in logs] == ["generation_config.ignored"]


def test_what_the_client_says_holds_and_only_what_it_leaves_out_is_the_models() -> None:
    asked = SamplingParams(temperature=0.0, top_k=3, min_tokens=2)
    assert settled(asked, {"top_p", "min_p", "min_tokens"}, SAID) == SamplingParams(
        temperature=0.0, top_k=3, min_tokens=2, top_p=0.95, min_p=0.05
    )
    assert settled(asked, (), SAID) == asked


def parsed(**fields: object) -> GenerateRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat(json.dumps(body).encode(), StreamId("s"), tenant="", request_id="").generations[0]


def test_a_request_tells_what_it_left_out() -> None:
    assert parsed().unset == set(RANGES)
    assert parsed(temperature=1.0, top_k=-1, top_p=None).unset == {"top_p", "min_p", "repetition_penalty"}


class Tokenizer:
    chat_template = "any"

    def apply_chat_template(self, messages: object, **how: object) -> dict[str, list[int]]:
        return {"input_ids": [1, 2]}

    def encode(self, text: str) -> list[int]:
        assert len(text) < 10_000, "what cannot fit is not read"
        return [3]

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1, "four": 2}


@pytest.mark.parametrize("own", [True, False])
async def test_the_models_defaults_reach_the_engine_unless_the_node_was_told_otherwise(own: bool) -> None:
    models = ServedModels()
    text = ModelText(Tokenizer(), (0,), 500, SAID)
    models.add(ServedModel(ModelCard(ModelId("m"), 4, 500, "w", "n"), Path(), text))
    prompts = Prompts(finder(models), None, models_defaults=own)  # type: ignore[arg-type]
    sampling = (await prompts.prepare(parsed(temperature=0.9))).sampling
    found = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty)
    assert found == ((0.9, 0.95, 20, 0.05, 1.1) if own else (0.9, 1.0, 0, 0.0, 1.0))
    plain = GenerateRequest(StreamId("s"), None, prompt="hi", sampling=SamplingParams(temperature=0.0))
    assert (await prompts.prepare(plain)).sampling.top_k == 0, "the node's own requests leave nothing out"


async def test_a_prompt_that_no_tokenizer_makes_fit_is_refused_unread() -> None:
    models = ServedModels()
    models.add(ServedModel(ModelCard(ModelId("m"), 4, 500, "w", "n"), Path(), ModelText(Tokenizer(), (0,), 500, {})))
    prompts = Prompts(finder(models), None)  # type: ignore[arg-type]
    said = parsed(messages=[{"role": "user", "content": "x" * 100_000}])
    for request in (said, GenerateRequest(StreamId("s"), None, prompt="x" * 100_000)):
        with pytest.raises(BadRequest, match="500 tokens; a prompt of 100000 characters is far beyond it") as refused:
            await prompts.prepare(request)
        assert refused.value.code == "context_length_exceeded"
    assert (await prompts.prepare(GenerateRequest(StreamId("s"), None, prompt="x" * 7_999))).tokens == (3,)


def test_the_node_knows_two_ways_to_take_it() -> None:
    assert NodeConfig().generation_config == "auto" and NodeConfig(generation_config="none").generation_config == "none"
    with pytest.raises(BadRequest, match="expected auto or none"):
        NodeConfig(generation_config="vllm")
