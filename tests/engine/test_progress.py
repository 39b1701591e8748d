"""How far a span has come while it loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM

from mesh.ids import ModelId
from mesh.view import Span
from node.engine import worker
from node.engine.api import EngineConfig
from node.engine.loading import load_stage
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.progress import PHASE_START, REPORT_INTERVAL_S, LoadPhase, LoadProgress, LoadTracker
from node.engine.worker import TorchEngine
from tests.engine.offered import FLOAT32, offered

KERNELS = offered(FLOAT32, "mesh-fp32")


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def test_layers_and_bytes_count_up_and_are_told_at_each_phase_and_every_two_seconds() -> None:
    told: list[LoadProgress] = []
    clock = Clock()
    tracker = LoadTracker(2, told.append, clock)
    tracker.start_reading({"embed": 10, "h.7.a": 1, "h.7.b": 2, "h.8.a": 4})
    assert told == [LoadProgress(LoadPhase.READING, 0, 2, 0, 17, 0.0)]
    tracker.tensor_read("embed")
    tracker.tensor_read("h.7.b")
    assert len(told) == 1
    clock.now += REPORT_INTERVAL_S
    tracker.tensor_read("h.7.a")
    assert told[1:] == [LoadProgress(LoadPhase.READING, 1, 2, 13, 17, REPORT_INTERVAL_S)]
    tracker.tensor_read("somebody's")
    assert tracker.now == told[1], "a tensor that nobody waits for counts for nothing"
    clock.now += 1.0
    assert tracker.now.seconds == REPORT_INTERVAL_S + 1.0, "the seconds go on while nothing comes"
    tracker.tensor_read("h.8.a")
    tracker.start_packing()
    tracker.layer_packed()
    tracker.layer_packed()
    tracker.start_checking()
    assert [(each.phase, each.layers_done, each.bytes_done) for each in told[2:]] == [
        (LoadPhase.PACKING, 0, 17),
        (LoadPhase.CHECKING, 2, 17),
    ]


def test_the_share_that_is_done_grows_from_phase_to_phase() -> None:
    clock = Clock()
    tracker, shares = LoadTracker(2, clock=clock), []
    tracker.start_reading({"h.0.a": 4, "h.1.a": 4})
    steps: list[Callable[[], None]] = [
        lambda: tracker.tensor_read("h.0.a"),
        lambda: tracker.tensor_read("h.1.a"),
        tracker.start_packing,
        tracker.layer_packed,
        tracker.layer_packed,
        tracker.start_checking,
    ]
    for step in steps:
        shares.append(tracker.now.share)
        step()
    shares.append(tracker.now.share)
    assert shares[0] == 0.0 and shares[-1] == PHASE_START[LoadPhase.CHECKING] < 1.0
    assert shares == sorted(shares) and len(set(shares)) == 5
    assert LoadProgress(LoadPhase.READING, 0, 2, 0, 0, 0.0).share == 0.0, "before anything is known of its size"


def test_a_load_that_begins_anew_with_another_kernel_counts_anew() -> None:
    tracker = LoadTracker(1)
    for size_bytes in (8, 4):
        tracker.start_reading({"h.0.a": size_bytes})
        tracker.tensor_read("h.0.a")
        assert (tracker.now.layers_done, tracker.now.bytes_done, tracker.now.bytes) == (1, size_bytes, size_bytes)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral", "gpt2"])
def test_a_load_is_seen_tensor_by_tensor_and_layer_by_layer(
    name: str, kernel: str, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[LoadProgress] = []
    monkeypatch.setattr("node.engine.model.progress.REPORT_INTERVAL_S", 0.0)
    tracker = LoadTracker(2, told.append)
    loaded = load_stage(read_checkpoint(checkpoint_of(name)), 1, 3, kernel, threads=1, tracker=tracker)

    phases = [each.phase for each in told]
    assert list(dict.fromkeys(phases)) == [LoadPhase.READING, LoadPhase.PACKING, LoadPhase.CHECKING]
    assert phases == sorted(phases, key=list(LoadPhase).index)
    assert {each.bytes for each in told} == {4 * loaded.stage.parameters}
    reading = [each for each in told if each.phase is LoadPhase.READING]
    assert [each.layers_done for each in reading] == sorted(each.layers_done for each in reading)
    assert (reading[-1].layers_done, reading[-1].bytes_done) == (2, 4 * loaded.stage.parameters)
    assert len({each.bytes_done for each in reading}) > 8, "tensor by tensor"
    packing = [each.layers_done for each in told if each.phase is LoadPhase.PACKING]
    assert packing == [0, 1, 2]


def test_what_others_read_in_this_process_is_no_load_of_ours(checkpoint_of: Callable[[str], Path]) -> None:
    tracker = LoadTracker(4)
    with tracker:
        AutoModelForCausalLM.from_pretrained(checkpoint_of("llama"))
    assert tracker.now.bytes_done == 0, "nothing of it was expected"
    tracker.start_reading({"model.layers.0.mlp.up_proj.weight": 1})
    AutoModelForCausalLM.from_pretrained(checkpoint_of("llama"))
    assert tracker.now.bytes_done == 0


def test_the_engine_tells_in_its_statistics_and_in_the_log(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(EngineConfig(dtype="float32"))
    span, seen = Span(ModelId("m"), 0, 4), []

    def watched(*given: object) -> object:
        loaded = load_stage(*given)  # type: ignore[arg-type]
        seen.append(engine.statistics().loading)
        return loaded

    monkeypatch.setattr(worker, "load_stage", watched)
    with capture_logs() as logs:
        engine.load(checkpoint_of("llama"), span.model, span.start, span.end)
    assert [list(each) for each in seen] == [[span]]
    assert seen[0][span].phase is LoadPhase.CHECKING and seen[0][span].layers == 4
    assert engine.statistics().loading == {}
    said = [(log["phase"], log["layers"]) for log in logs if log["event"] == "span loading"]
    assert said[0] == ("reading", "0/4") and said[-1] == ("checking", "4/4")
    ended = next(log for log in logs if log["event"] == "span loaded")
    assert ended["seconds"] > 0 and re.fullmatch(r"\d+\.\d\d GiB", ended["read"])


def test_a_load_that_fails_is_told_of_no_longer(checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("no memory")

    engine = TorchEngine(EngineConfig(dtype="float32"))
    monkeypatch.setattr(worker, "load_stage", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.load(checkpoint_of("llama"), ModelId("m"), 0, 4)
    assert engine.statistics().loading == {}
