"""Training the small model: the same weights however often interrupted, and a directory that transformers reads as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.default_model import checkpoints, drills, evaluate, export, train, training
from tools.default_model.checkpoints import Run
from tools.default_model.curriculum import LESSON_STEPS, NOTICE_STEPS, STAGES, rate_at, stage_at
from tools.default_model.drills import Parts
from tools.default_model.examples import Maker
from tools.default_model.model import Model, block_mask
from tools.default_model.optimisers import Optimisers
from tools.default_model.prompts import ASSISTANT, END, LABELS, MARKS, REFUSAL, USER
from tools.default_model.prose import Prose, Source
from tools.default_model.shape import SHAPES
from tools.default_model.training import Plan
from tools.default_model.vocabulary import load_tokenizer

TINY = SHAPES["tiny"]
STEPS = 6
LONG = next(number for number, stage in enumerate(STAGES) if stage.row_tokens == 512)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a little prose and a tokenizer of the tiny shape."""
    work = tmp_path_factory.mktemp("work")
    nouns = ["router", "cache", "journal", "shard", "replica", "queue", "node", "token", "block", "index"]
    paragraphs = tuple(
        f"The {a} keeps a {b} for every {c} that it knows. When the {b} is lost, another {a} sends it again within a second."
        for a in nouns
        for b in nouns
        for c in nouns[:5]
        if len({a, b, c}) == 3
    )
    Prose(paragraphs, (Source("made up", "Apache-2.0", len(paragraphs), sum(map(len, paragraphs))),)).save(work / "prose.json")
    train.prepare(work, seed=1, vocabulary=TINY.vocabulary)
    return work


def run_in(work: Path, prepared: Path, stops: list[int | None]) -> tuple[Run, Model]:
    """A run of `STEPS` steps in `work`, left and taken up again after each of `stops`."""
    work.mkdir()
    for name in ("prose.json", "tokenizer.json"):
        (work / name).write_bytes((prepared / name).read_bytes())
    for stop in stops:
        run = checkpoints.read_run(work) or Run(TINY, 7, 1024)
        model = Model(TINY, 7)
        optimisers = Optimisers(model)
        if run.steps:
            checkpoints.restore(work, model, optimisers)
        plan = Plan(work, "cpu", STEPS, None, workers=0, compiled=False, stop_after_steps=stop)
        run = training.train(plan, run, model, optimisers)
    return run, model


def test_an_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(prepared: Path, tmp_path: Path) -> None:
    whole, model = run_in(tmp_path / "whole", prepared, [None])
    parts, again = run_in(tmp_path / "parts", prepared, [2, 3, None])
    assert whole.steps == parts.steps == STEPS and whole.tokens == parts.tokens
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not list((tmp_path / "parts").glob(".checkpoint*")), "nothing is left aside"


def test_a_time_budget_counts_what_was_trained_before(prepared: Path, tmp_path: Path) -> None:
    run, _ = run_in(tmp_path / "run", prepared, [2])
    run.seconds = 99.0
    ticks = iter(float(second) for second in range(1000))
    model = Model(TINY, 7)
    plan = Plan(tmp_path / "run", "cpu", None, 101.0, workers=0, compiled=False)
    ended = training.train(plan, run, model, Optimisers(model), clock=lambda: next(ticks))
    assert 101.0 <= ended.seconds < 110.0 and ended.steps < STEPS


def test_a_session_ends_before_the_run_does(prepared: Path, tmp_path: Path) -> None:
    run, _ = run_in(tmp_path / "run", prepared, [1])
    ticks = iter(float(second) for second in range(1000))
    model = Model(TINY, 7)
    plan = Plan(tmp_path / "run", "cpu", None, 500.0, workers=0, compiled=False, session_s=4.0)
    left = training.train(plan, run, model, Optimisers(model), clock=lambda: next(ticks))
    kept = checkpoints.read_run(tmp_path / "run")
    assert left.seconds < 100.0 and kept is not None and kept.steps == left.steps > 1


def test_rows_are_packed_and_a_batch_is_a_function_of_its_number(prepared: Path) -> None:
    maker, other = Maker.load(prepared, 3), Maker.load(prepared, 3)
    other.batch(0, 0, 2048)
    batch, again = maker.batch(5, LONG, 4096), other.batch(5, LONG, 4096)
    assert batch.ids.shape == (8, 512) and np.array_equal(batch.ids, again.ids)
    assert (batch.segments > 0).mean() > 0.75
    assert not batch.weights[batch.segments == 0].any(), "padding teaches nothing"
    starts = batch.positions == 0
    for row in range(8):
        numbers = batch.segments[row]
        assert list(numbers[numbers > 0]) == sorted(numbers[numbers > 0])
        assert starts[row][numbers > 0].sum() == numbers.max()


def test_an_answer_begins_with_the_label_of_its_sentence_and_the_label_weighs_most(prepared: Path) -> None:
    maker = Maker.load(prepared, 3)
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    answered = refused = broken_off = 0
    for number in range(4):
        batch = maker.batch(number, LONG, 4096)
        for row in range(len(batch.ids)):
            for segment in range(1, batch.segments[row].max() + 1):
                mine = batch.segments[row] == segment
                turns = tokenizer.decode(batch.ids[row][mine].tolist(), skip_special_tokens=False).split(ASSISTANT)
                told = dict(line.split("|>", 1) for line in turns[0].removeprefix(USER).splitlines() if line.endswith(MARKS))
                for turn in turns[1:]:
                    name, _, text = turn.partition("|>")
                    if not (told and name.startswith("<|s")):
                        continue
                    answer = text.partition(USER)[0]
                    broken_off += not answer
                    refused += answer == f"{REFUSAL}{END}"
                    answered += answer == f"{told.get(name)}{END}"
                    assert answer in ("", f"{REFUSAL}{END}", f"{told.get(name)}{END}")
                heavy = batch.ids[row][np.flatnonzero(mine & (batch.weights[row] > 1.0)) + 1]
                assert all(tokenizer.id_to_token(token) in LABELS for token in heavy)
    assert answered > 10 and refused > 0 and broken_off > 10


@pytest.mark.parametrize("drill", [drills.recall, drills.quiz])
def test_a_drill_asks_for_the_label_of_the_one_run_that_has_the_words(drill: Callable[..., Parts]) -> None:
    pool = ["stone", "river", "cloud", "field", "tower", "bridge", "garden"]
    asked = 0
    for seed in range(40):
        (told, learned), *questions = drill(Random(seed), pool, 400)
        assert not learned
        runs = dict(line.split("|>", 1) for line in told.splitlines())
        for (question, _), (chosen, is_learned) in zip(questions[::2], questions[1::2], strict=True):
            words = question.replace(USER, "").replace(ASSISTANT, "").replace("?", "").split()
            assert is_learned and words
            assert [name for name, run in runs.items() if set(words) <= set(run.split())] == [chosen.removesuffix("|>")]
            asked += 1
    assert asked > 200


def test_a_token_sees_its_own_example_and_nothing_later() -> None:
    model = Model(TINY, 1)
    first, second = torch.arange(5), torch.arange(20, 27)
    packed = torch.cat([first, second])[None]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    segments = torch.tensor([[1] * 5 + [2] * 7])
    hidden = model(packed, positions, block_mask(segments, torch.float32))[0]
    alone = model(second[None], torch.arange(7)[None], None)[0]
    assert torch.allclose(hidden[5:], alone, atol=1e-5)


def test_an_exported_model_computes_what_was_trained(prepared: Path, tmp_path: Path) -> None:
    model = Model(TINY, 3)
    export.export(tmp_path / "out", Run(TINY, 3, 1024, device="a test"), model, prepared, stored=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(0, TINY.vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40).expand(2, 40)
    with torch.inference_mode():
        ours = model.logits(model(ids, positions, None))
        assert torch.allclose(loaded(ids).logits, ours, atol=1e-4)
    assert sum(each.numel() for each in model.parameters()) == TINY.parameters == loaded.num_parameters()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 2
    again = Model(TINY, 4)
    export.load_into(again, tmp_path / "out")
    assert torch.equal(again.embedding, model.embedding)


def test_the_shapes_fit_the_package_and_can_be_split() -> None:
    for name in ("cpu", "gpu"):
        shape = SHAPES[name]
        assert shape.layers >= 6 and shape.width == shape.heads * shape.head_dim
        assert 5e6 < shape.parameters < 12e6 and 2 * shape.parameters < 0.8 * export.MAX_BYTES


def test_a_model_too_large_for_the_package_is_refused(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1000"):
        export.export(tmp_path, Run(TINY, 3, 1024), Model(TINY, 3), prepared)


def test_stages_follow_one_another_and_the_rate_rises_holds_and_falls() -> None:
    bounds = [stage.until for stage in STAGES]
    assert bounds == sorted(bounds) and bounds[-1] == 1.0
    assert [stage_at(bound - 0.01, 10, []) for bound in bounds] == list(range(len(STAGES)))
    assert all(abs(sum(stage.mix.values()) - 1.0) < 1e-9 for stage in STAGES)
    assert 0.0 < rate_at(0.0) < rate_at(0.005) < rate_at(0.01) == rate_at(0.2) == 1.0
    assert 1.0 > rate_at(0.5) > rate_at(0.9) > rate_at(1.0) == 0.0


def test_a_mastered_stage_ends_early_and_the_end_is_known_before_its_batches_are_made(prepared: Path, tmp_path: Path) -> None:
    assert [stage_at(0.0, step, [40, 90]) for step in (0, 39, 40, 89, 90)] == [0, 0, 1, 1, 2]
    assert stage_at(STAGES[2].until, 50, [40]) == 3, "the run's share ends a stage too"
    run = Run(TINY, 7, 1024)
    for step in range(1, 2 * LESSON_STEPS + 1):
        run.steps = step
        right = 10.0 if step > LESSON_STEPS else 5.0
        training.end_stage_if_mastered(run, 0, right, 10.0)
    assert run.ends == [2 * LESSON_STEPS + NOTICE_STEPS] and run.lesson == [0.0, 0.0]
    run.steps += LESSON_STEPS
    training.end_stage_if_mastered(run, 0, 10.0, 10.0)
    assert len(run.ends) == 1, "batches of the ended stage still in flight end nothing"


def test_one_command_trains_exports_and_measures(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name in ("prose.json", "tokenizer.json"):
        (work / name).write_bytes((prepared / name).read_bytes())
    chosen = ["--work", str(work), "--shape", "tiny", "--device", "cpu", "--seed", "1", "--step-tokens", "512", "--workers", "1"]
    assert train.main([*chosen, "--steps", "2"]) == 0
    digest = hashlib.sha256((work / "mesh-demo" / "model.safetensors").read_bytes()).hexdigest()
    assert train.main([*chosen, "--steps", "2"]) == 0, "nothing is left to do"
    assert hashlib.sha256((work / "mesh-demo" / "model.safetensors").read_bytes()).hexdigest() == digest
    assert train.main([*chosen, "--steps", "2", "--seed", "9"]) == 2, "another seed is another run"
    capsys.readouterr()
    missing = ["--xquad", str(tmp_path / "absent.json")]
    assert evaluate.main(["--json", "--card", "--model", str(work / "mesh-demo"), "--count", "8", *missing]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = {"world_exact", "world_cited", "unanswerable_refused", "xquad_sentence", "docs_sentence"}
    counted = {"parameters", "bytes", "train_tokens", "train_seconds", "device"}
    assert measured | counted <= set(found) and found["parameters"] == TINY.parameters
    assert found["xquad_sentence"] is None and "not measured" in found["notes"][0]
    assert 0.2 < found["baseline"]["world_exact"] <= 1.0, "the rule finds some"
    card = (work / "mesh-demo" / "README.md").read_text()
    assert "<<" not in card and "| made up | Apache-2.0 |" in card and f"{found['baseline']['world_exact']:.3f}" in card
    assert evaluate.main(["--model", str(tmp_path)]) == 2, "no model there"
