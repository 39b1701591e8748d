"""Grammar constraints: the mask is a pure function of (grammar, answer), and every finished answer fits."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import BadRequest
from mesh.ids import ModelId, StreamId
from node.engine.api import OpenSequence, SequenceLost, TokenOut
from node.engine.sampling.constraints import CompiledGrammars, GrammarConstraint, StepSampler, Ungrammatical
from node.requests import Grammar, SamplingParams
from node.text.grammar import compiled
from node.text.tokenizer import ModelText
from tests.engine.checkpoints import make_checkpoint
from tests.engine.test_worker import connect, opening, running

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "count", "tags"],
    "additionalProperties": False,
}
JSON = Grammar("json", json.dumps(SCHEMA))
CHOICE = Grammar("choice", json.dumps(["yes", "no", "yes indeed"]))
REGEX = Grammar("regex", r"[ab]{2,5}(-[0-9]+)?")
OPEN = Grammar("regex", r"x+")  # has no longest answer
PROMPT = tuple(range(20, 57))
VOCAB = 2048


@pytest.fixture(scope="module")
def tiny(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four small layers that has a tokenizer."""
    directory = make_checkpoint(tmp_path_factory.mktemp("tokenized"), "llama", vocab_size=VOCAB, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(random_model / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def grammars(random_model: Path) -> CompiledGrammars:
    return CompiledGrammars(random_model, VOCAB, frozenset({0, 2}))


@pytest.fixture(scope="module")
def text(random_model: Path) -> ModelText:
    return ModelText.load(random_model)


def fits(grammar: Grammar, answer: str) -> bool:
    match grammar.kind:
        case "regex":
            return re.fullmatch(grammar.source, answer) is not None
        case "choice":
            return answer in json.loads(grammar.source)
    value = json.loads(answer)
    return (
        list(value) == ["colour", "count", "tags"]
        and value["colour"] in ("red", "blue")
        and 0 <= value["count"] <= 99
        and 1 <= len(value["tags"]) <= 3
    )


def random_answer(constraint: GrammarConstraint, seed: int, max_tokens: int = 200) -> tuple[list[int], list[np.ndarray]]:
    """Draws a random answer within the grammar, to its end; returns it and the mask before each of its tokens."""
    rng = np.random.default_rng(seed)
    answer: list[int] = []
    masks = []
    while len(answer) < max_tokens and not constraint.complete(answer):
        masks.append(constraint.allowed(answer))
        token = int(rng.choice(np.flatnonzero(masks[-1])))
        answer.append(token)
        if token in (0, 2):
            break
    return answer, masks


@pytest.mark.parametrize("grammar", [JSON, CHOICE, REGEX], ids=lambda grammar: grammar.kind)
def test_every_answer_drawn_within_a_grammar_fits_it(grammar: Grammar, grammars: CompiledGrammars, text: ModelText) -> None:
    answers = {text.decode(random_answer(grammars.constraint(grammar), seed)[0]) for seed in range(30)}
    assert len(answers) > 2 and all(fits(grammar, answer) for answer in answers), answers


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), order=st.randoms(use_true_random=False))
def test_the_mask_depends_on_the_answer_alone_not_on_earlier_calls(seed: int, order: Any, shared_grammars: Any) -> None:
    answer, masks = random_answer(shared_grammars.constraint(JSON), seed)
    other, _ = random_answer(shared_grammars.constraint(JSON), seed + 1)
    asked = shared_grammars.constraint(JSON)
    positions = list(range(len(masks))) * 2
    order.shuffle(positions)
    for position in positions:
        if order.random() < 0.3:
            asked.complete(other[: order.randrange(len(other))])
        assert np.array_equal(asked.allowed(answer[:position]), masks[position])


@pytest.fixture(scope="module")
def shared_grammars(grammars: CompiledGrammars) -> Iterator[CompiledGrammars]:
    yield grammars


def test_an_answer_that_does_not_fit_or_is_complete_raises(grammars: CompiledGrammars, text: ModelText) -> None:
    with pytest.raises(Ungrammatical):
        grammars.constraint(JSON).allowed(text.encode("hello"))
    done = grammars.constraint(Grammar("choice", '["a"]'))
    [token] = text.encode("a")
    assert done.complete([token])
    with pytest.raises(Ungrammatical):
        done.allowed([token, token])


def test_end_tokens_can_be_excluded_while_other_tokens_are_allowed(grammars: CompiledGrammars, text: ModelText) -> None:
    constraint = grammars.constraint(OPEN)
    x = list(text.encode("x"))
    assert constraint.allowed(x)[[0, 2]].all()
    assert not constraint.allowed(x, may_end=False)[[0, 2]].any()
    one = grammars.constraint(Grammar("regex", "(x)?"))
    assert one.allowed([], may_end=False).any()


def test_a_grammar_is_compiled_once_and_the_oldest_is_dropped(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Grammar] = []

    def counting(grammar: Grammar, tokenizer: Any) -> Any:
        made.append(grammar)
        return compiled(grammar, tokenizer)

    monkeypatch.setattr("node.engine.sampling.constraints.MAX_COMPILED", 2)
    monkeypatch.setattr("node.engine.sampling.constraints.compiled", counting)
    grammars = CompiledGrammars(random_model, VOCAB, frozenset({2}))
    for grammar in (CHOICE, CHOICE, REGEX, OPEN, REGEX, CHOICE):
        grammars.prepare(grammar)
    assert made == [CHOICE, REGEX, OPEN, CHOICE]  # the first grammar had been dropped


def test_a_model_without_a_readable_tokenizer_refuses_grammars_by_field(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as refused:
        CompiledGrammars(tmp_path, VOCAB, frozenset({2})).prepare(REGEX)
    assert refused.value.param == "response_format"


# ---- one draw


def opened(**sampling: Any) -> OpenSequence:
    params = SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **sampling})
    return OpenSequence(StreamId("s"), 0, 1, ModelId("toy"), 0, 4, len(PROMPT), len(PROMPT), PROMPT, params)


@pytest.fixture
def step_sampler(grammars: CompiledGrammars) -> StepSampler:
    one = StepSampler()
    one.serve(ModelId("toy"), grammars)  # compiled grammars are shared between tests
    return one


def drawn(step_sampler: StepSampler, sequence: OpenSequence, answer: list[int], logits: Any = None, stop: Any = (2,)) -> Any:
    given = np.zeros(VOCAB, dtype=np.float32) if logits is None else logits
    step_sampler.forget(sequence.key)
    return step_sampler.draw(given, sequence, len(PROMPT) + len(answer), (*PROMPT, *answer), stop)


def test_the_likeliest_allowed_token_is_drawn_with_any_sampling_parameters(step_sampler: StepSampler, text: ModelText) -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[5] = 9.0
    [brace] = text.encode("{")
    for more in ({}, {"temperature": 1.0}, {"logprobs": 2}, {"repetition_penalty": 1.5}):
        assert drawn(step_sampler, opened(grammar=Grammar("json", '{"type":"object"}'), **more), [], logits).token in (
            brace,
            *(token for token in range(VOCAB) if text.decode([token]).startswith("{")),
        )


def test_a_logit_bias_cannot_break_the_grammar(step_sampler: StepSampler) -> None:
    free = drawn(step_sampler, opened(logit_bias={5: 100.0}), []).token
    bound = drawn(step_sampler, opened(logit_bias={5: 100.0}, grammar=CHOICE), []).token
    assert free == 5 and bound != 5


def test_logits_with_nan_draw_no_token_within_a_grammar(step_sampler: StepSampler) -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[5] = np.nan  # a token that the grammar does not allow
    for temperature in (0.0, 1.0):
        assert drawn(step_sampler, opened(grammar=CHOICE, temperature=temperature), [], logits).token is None


def test_an_answer_ends_with_the_token_that_completes_the_grammar(step_sampler: StepSampler, text: ModelText) -> None:
    [n] = text.encode("n")
    out = drawn(step_sampler, opened(grammar=Grammar("choice", '["no"]')), [n])
    assert text.decode([out.token]) == "o" and out.ends
    assert not drawn(step_sampler, opened(grammar=OPEN), []).ends


def test_min_tokens_and_ignore_eos_delay_the_end_while_the_grammar_allows(step_sampler: StepSampler, text: ModelText) -> None:
    x = list(text.encode("x"))
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[0, 2]] = 9.0
    assert drawn(step_sampler, opened(grammar=OPEN), x, logits, (0, 2)).token in (0, 2)
    assert drawn(step_sampler, opened(grammar=OPEN, min_tokens=5), x, logits, (0, 2)).token not in (0, 2)
    assert drawn(step_sampler, opened(grammar=OPEN, ignore_eos=True), x, logits, ()).token not in (0, 2)
    short = opened(grammar=Grammar("choice", '["x"]'), min_tokens=5)
    assert drawn(step_sampler, short, [], logits, (0, 2)).ends  # the grammar allows a single token


def test_an_answer_outside_its_grammar_draws_no_token_with_a_reason(step_sampler: StepSampler, text: ModelText) -> None:
    out = drawn(step_sampler, opened(grammar=CHOICE), list(text.encode("maybe")))
    assert out.token is None and "response_format" in out.why_none


# ---- the engine


def constrained(name: str, grammar: Grammar = JSON, **more: Any) -> OpenSequence:
    return opening(name, tokens=PROMPT, end=4, **{"grammar": grammar, "max_tokens": 120, "temperature": 1.0, **more})


def test_a_constrained_answer_is_the_same_batched_split_and_after_failover(tiny: Path, text: ModelText) -> None:
    with running((tiny, 0, 4)) as one:
        for number in range(3):
            one.engine.open(opening(f"free{number}", end=4, seed=number, max_tokens=40))
        one.engine.open(constrained("a"))
        undisturbed = one.tokens_of(constrained("a").key)
        assert fits(JSON, text.decode(undisturbed)) and undisturbed[-1] not in (0, 2)
        for done in range(1, len(undisturbed), 5):
            resumed = constrained("a", attempt=2 + done)
            known = (*PROMPT, *undisturbed[:done])
            one.engine.open(opening_from(resumed, known))
            assert one.tokens_of(resumed.key) == undisturbed[done:]

    with running((tiny, 0, 2)) as first, running((tiny, 2, 4)) as last:
        connect(first, last)
        whole = constrained("a")
        last.engine.prepare(whole)
        last.engine.open(opening("a", 2, 4, tokens=PROMPT, grammar=JSON, max_tokens=120, temperature=1.0))
        first.engine.open(opening("a", 0, 2, tokens=PROMPT, max_tokens=120, temperature=1.0))
        assert last.tokens_of(whole.key) == undisturbed


def opening_from(sequence: OpenSequence, known: tuple[int, ...]) -> OpenSequence:
    fields = {name: getattr(sequence, name) for name in sequence.__struct_fields__}
    return OpenSequence(**{**fields, "tokens": known, "known": len(known)})


def test_choices_with_different_seeds_fit_the_grammar_and_differ(tiny: Path, text: ModelText) -> None:
    with running((tiny, 0, 4)) as one:
        answers = []
        for seed in range(4):
            one.engine.open(constrained(f"seed{seed}", seed=seed))
            answers.append(text.decode(one.tokens_of(constrained(f"seed{seed}").key)))
        assert one.engine.constrained_sequences <= 1  # the state of ended sequences is freed with the next step
    assert all(fits(JSON, answer) for answer in answers) and len(set(answers)) > 1


def test_a_sequence_outside_its_grammar_fails_alone(tiny: Path, text: ModelText) -> None:
    free = alone_in(tiny, opening("free", end=4))
    with running((tiny, 0, 4)) as one:
        broken = constrained("broken")
        known = (*PROMPT, *text.encode("hello"))
        one.engine.open(opening("free", end=4))
        one.engine.open(opening_from(broken, known))
        outputs = [one.next() for _ in range(13)]
    [lost] = [out for out in outputs if isinstance(out, SequenceLost)]
    assert lost.key == broken.key and not lost.retryable and "does not fit the grammar" in lost.reason
    assert [out.token for out in outputs if isinstance(out, TokenOut)] == free


def alone_in(directory: Path, sequence: OpenSequence) -> list[int]:
    with running((directory, 0, 4)) as one:
        one.engine.open(sequence)
        return one.tokens_of(sequence.key)


def test_an_engine_refuses_a_grammar_it_cannot_compile(tiny: Path) -> None:
    with running((tiny, 0, 4)) as one, pytest.raises(BadRequest, match="response_format"):
        one.engine.prepare(constrained("a", Grammar("regex", "((")))
