"""bench.engine_compiled: with the compiled kernel and without, in this process; that the least of all rounds counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import engine_compiled
from bench.engine_compiled import WAYS, least, measured_here
from bench.engine_shapes import SHAPES, make_checkpoint
from node.host.environment import CPU_ISA_VARIABLE

TINY = {**SHAPES["100M"], "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 64, "vocab_size": 600}


def test_a_way_of_computing_is_measured_in_decoding_and_in_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_compiled, "BATCHES", (1, 2))
    make_checkpoint(tmp_path, TINY)
    found = measured_here(tmp_path)
    assert list(found) == ["kernel", "step_ms, batch 1", "step_ms, batch 2", "prompt_ms, 512 tokens"]
    assert " on " in found.pop("kernel") and all(figure > 0 for figure in found.values())


def test_the_least_of_all_rounds_counts() -> None:
    rounds = [{"kernel": "a on b", "step_ms": 2.04}, {"kernel": "a on b", "step_ms": 3.0}, {"kernel": "c on b", "step_ms": 5.0}]
    assert least(rounds) == {"kernel": "a on b, c on b", "step_ms": 2.0}


def test_every_way_takes_part_in_every_round(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def child(directory: Path, environment: dict[str, str]) -> dict[str, Any]:
        assert (directory / "config.json").is_file()
        asked.append(environment.get(CPU_ISA_VARIABLE, ""))
        return {"kernel": "a", "step_ms": float(len(asked))}

    monkeypatch.setattr(engine_compiled, "in_a_child", child)
    monkeypatch.setitem(SHAPES, "100M", TINY)
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "2"])
    engine_compiled.main()
    assert asked == ["", "none", "avx2", "none"] * 2
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {way: told["step_ms"] for way, told in report["ways"].items()} == dict(zip(WAYS, (1.0, 2.0, 3.0, 4.0)))
