"""bench.engine on a tiny model: all sides decode the same model, and what is missing says so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from bench import (
    capped,
    engine,
    engine_context,
    engine_exactness,
    engine_gpu,
    engine_loading,
    engine_prefill,
    engine_products,
    engine_quantised,
    engine_rows,
    engine_sampler,
    engine_split,
    llama_api,
    llama_side,
)
from bench.engine_exactness import freed
from bench.engine_goals import judged
from bench.engine_shapes import SHAPES, make_checkpoint, prompts, weights_read_bytes
from bench.engine_sides import ForwardLoop, GenerateBatch, Ours, Step, best_dtypes, faster, judged_by, plain_model
from bench.llama_convert import Tensors, as_float32, turned
from node.engine.loading import load_stage
from node.engine.model import attention
from node.engine.model.attention import Segment, tiles_of
from node.engine.model.checkpoint import read_checkpoint
from tests.engine.devices import no_gpu

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    make_checkpoint(directory, TINY)
    return directory


def test_every_side_in_this_process_decodes_the_same_tokens(tiny: Path) -> None:
    checkpoint = read_checkpoint(tiny)
    ours = Ours(load_stage(checkpoint, 0, 3, "float32", 1).stage, 3)
    model = plain_model(tiny, torch.float32)
    loop = ForwardLoop(model, 3)
    assert ours._next == loop.first
    assert len(ours.turn(4)) == len(loop.turn(4)) == 4
    assert ours._next == loop._next[:, 0].tolist()
    assert len(GenerateBatch(model, 3).turn(2)) == 3 * 2


def test_the_bench_of_a_gpu_compares_with_generate(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a forward of `generate` takes a second, and the rest of it nothing."""
    clock_s = [0.0]

    def tick(*given: Any) -> None:
        clock_s[0] += 1.0

    def ticking(directory: Path, dtype: torch.dtype) -> Any:
        model = plain_model(directory, dtype)
        model.register_forward_hook(tick)
        return model

    monkeypatch.setattr(engine_gpu, "plain_model", ticking)
    monkeypatch.setattr(engine_gpu, "time", SimpleNamespace(perf_counter=lambda: clock_s[0]))
    report = engine_gpu.measure(tiny, torch.device("cpu"), batches=(1, 3), rounds=1, steps=3)
    assert [row["batch"] for row in report["rows"]] == [1, 3] and report["exact"] and report["device"] == "cpu"
    assert [row["hf_generate_tok_s"] for row in report["rows"]] == [1.0, 3.0]
    assert all(row["ours_tok_s"] > 0 for row in report["rows"])


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
def test_a_bench_on_a_gpu_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench.engine", "--quick", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        engine.main()
    assert ended.value.code == 2 and "--device cuda: " in capsys.readouterr().err


def test_a_batch_repeats_the_prompts_of_a_smaller_one() -> None:
    assert prompts(3, 512)[:2] == prompts(2, 512)


def test_bits_that_a_batch_changes_are_told(tiny: Path) -> None:
    stage = load_stage(read_checkpoint(tiny), 0, 3, "float32", 1).stage
    alone, among = Ours(stage, 1), Ours(stage, 3)
    alone.turn(3), among.turn(2)
    assert engine_rows.same_bits([alone, among])
    among.said[1] = b"another"
    assert not engine_rows.same_bits([alone, among])


def test_a_step_reads_all_weights_but_embedding_and_norms(tiny: Path) -> None:
    model = plain_model(tiny, torch.bfloat16)
    counted = sum(weight.numel() for name, weight in model.named_parameters() if "norm" not in name and "embed" not in name)
    assert weights_read_bytes(model.config, 2) == 2 * counted


def test_freed_from_exactness_a_row_meets_the_keys_that_exist_and_no_more(tiny: Path) -> None:
    stage = load_stage(read_checkpoint(tiny), 0, 3, "float32", 1).stage
    row = Segment(0, 1, 70, stage.sequence())
    with freed():
        assert [tile.length for tile in tiles_of(row, 0)] == [71]
        assert attention.ROW_QUANTUM == 1
    assert [tile.length for tile in tiles_of(row, 0)] == [128]
    cost = engine_exactness.overhead(stage, {}, 70, 1, 0.0)
    assert set(cost["cpu_ms"]) == {"exact", "freed"} and cost["cpu"] > -1


def test_turned_rows_give_neighbours_what_halves_gave() -> None:
    """The rotation of pairs (2 i, 2 i + 1) of the turned rows is that of (i, i + half) of the others."""
    rows = numpy.arange(2 * 8 * 3).reshape(16, 3)  # two heads of eight
    after = turned(rows, 2).reshape(2, 4, 2, 3)
    before = rows.reshape(2, 2, 4, 3)
    assert (after[:, :, 0] == before[:, 0]).all() and (after[:, :, 1] == before[:, 1]).all()


def test_the_other_side_reads_the_weights_that_we_do(tiny: Path) -> None:
    tensors = Tensors(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in tensors
    read = torch.from_numpy(as_float32(tensors.bits(name)))
    assert torch.equal(read, plain_model(tiny, torch.float32).state_dict()[name])


def test_resident_memory_is_told_by_the_system_and_a_wrong_field_is_refused() -> None:
    assert 1 << 20 < engine_loading.resident_bytes("VmRSS") <= engine_loading.resident_bytes("VmHWM")
    with pytest.raises(ValueError, match="VmNone"):
        engine_loading.resident_bytes("VmNone")


def test_where_llama_cpp_is_absent_its_figures_are_null_and_the_report_says_why(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_side, "PYTHON", tiny / "no such python")
    monkeypatch.setattr(engine_rows, "BATCHES", (1, 2))
    for name in ("ROUNDS", "QUICK_ROUNDS"):
        monkeypatch.setattr(engine, name, 1)
    monkeypatch.setattr(engine_loading, "measured_apart", lambda directory: {"ratio": 1.25})
    monkeypatch.setattr("bench.bandwidth.MEASURED_BYTES", 1 << 20)
    monkeypatch.setattr("bench.bandwidth.MemoryReader.measure", lambda reader: 0.5)
    bench = engine.Bench(tiny, 1, 0.0, quick=True)
    figures: dict[str, Any] = {}
    for part in ("loading", "rows", "prefill", "exactness"):
        figures |= bench.parts[part]()
    report = judged(json.loads(json.dumps(figures)))
    assert [each["batch"] for each in report["rows"]] == [1, 2]
    for each in report["rows"]:
        assert each["llamacpp_tok_s"] is None and each["vs_llamacpp"] is None
        assert each["vs_hf"] > 0 < each["vs_hf_cpu_time"]
        assert each["memory_gb_s"] == 0.5 and each["bandwidth_fraction"] == pytest.approx(2 * each["weights_gb_s"], abs=0.11)
        assert each["vs_generate_batch"] is None, "--quick leaves it out"
    assert report["prefill_vs_hf"] > 0 and report["prefill"]["llamacpp_weights"] == "left out"
    assert set(report["invariance_overhead"]) == {"short", "long"}
    assert report["exact"] is True and report["peak_load_ratio"] == 1.25
    assert "make bench-peers" in report["llamacpp"]["absent"]
    assert report["judged_by"] == "cpu_time"
    missing = ["products", "quantised", "split2_ratio", "prefix_hit_ttft_ratio", "spec_speedup_copy_task", "context_step_ratio"]
    missing += ["vs_generate_batch at batch 1", "vs_llamacpp_cpu_time at batch 1"]
    assert report["not_measured"] == missing


def test_what_is_asked_stands_beside_each_figure_and_what_misses_it_is_named() -> None:
    row = {"batch": 1, "vs_hf": 1.9, "vs_generate_batch": 4.0, "vs_llamacpp": None, "bandwidth_fraction": 0.7}
    figures = {"peak_load_ratio": 1.3, "split2_ratio": 0.89, "prefix_hit_ttft_ratio": 0.2, "exact": False}
    cost = {"short": 0.1, "long": 0.05}
    report = judged({"rows": [row], "invariance_overhead": cost, "split": {"exact": False}, **figures})
    assert report["rows"][0]["asked"] == {"vs_hf": 2.0, "vs_generate_batch": 4.0, "vs_llamacpp": 1.0, "bandwidth_fraction": 0.65}
    assert report["asked"]["invariance_overhead"] == {"short": 0.15, "long": 0.03} and report["asked"]["peak_load_ratio"] == 1.3
    assert report["missed"] == [
        "vs_hf at batch 1: 1.9, asked 2.0",
        "invariance_overhead long: 0.05, asked 0.03",
        "split2_ratio: 0.89, asked 0.9",
        "prefix_hit_ttft_ratio: 0.2, asked 0.1",
        "exact: False, asked True",
        "answers of a part of the bench equal: False, asked True",
    ]
    missing = ["products", "quantised", "spec_speedup_copy_task", "prefill_vs_hf", "context_step_ratio", "vs_llamacpp at batch 1"]
    assert report["not_measured"] == missing


def test_a_report_grows_part_by_part_and_only_beside_others_of_its_kind(tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    head = {"shape": "100M", "threads": 1, "commit": "abc", "capped": {}}
    engine.Report(head, out).add({"peak_load_ratio": 1.1}, "loading", 2.0)
    engine.Report(head, out).add({"split2_ratio": 0.95}, "split", 3.0)
    report = json.loads(out.read_text())
    assert (report["peak_load_ratio"], report["split2_ratio"], report["took_s"]) == (1.1, 0.95, {"loading": 2.0, "split": 3.0})
    engine.Report({**head, "commit": "abd"}, out).add({"split2_ratio": 0.9}, "split", 3.0)
    assert "peak_load_ratio" not in json.loads(out.read_text())


def test_two_stages_say_what_one_does(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_split, "BATCH", 3)
    monkeypatch.setattr(engine_split, "ANSWER_TOKENS", 6)
    before = os.sched_getaffinity(0)
    found = engine_split.measured(tiny, 1, 1)
    assert found["exact"] is True and found["split2_ratio"] > 0 and found["split2_ratio_cpu_time"] > 0
    assert os.sched_getaffinity(0) == before


def test_the_faster_dtype_is_found_for_each_batch(tiny: Path) -> None:
    assert set(best_dtypes(tiny, (1, 2), 1)) == {1, 2}


def test_products_are_timed_for_each_layer_and_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    ours = engine_products.chosen_here()
    report = engine_products.measure(["tiny"], ours, rows=(1, 3), rounds=1, caches=0)
    found = report["shapes"]["tiny"]
    assert set(found["cpu_us"]) == {"qkv", "out", "gate_up", "down"}
    there = [name for name in engine_products.USUAL if name in engine_products.contenders()]
    for by_rows in found["cpu_us"].values():
        assert set(by_rows) == {1, 3} and all(list(times_us) == there for times_us in by_rows.values())
    if ours:
        where = {f"{layer} x{rows}" for layer in found["cpu_us"] for rows in (1, 3)}
        assert set(found["vs_best"]) == where == set(found["mesh-int8 vs mesh-bf16"])
        table = engine_products.table("tiny", found["cpu_us"], ours)
        assert len(table.splitlines()) == 2 + 8 and ours in table


def test_a_quick_run_times_fewer_rows_of_the_small_shape(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, engine.QUICK_SHAPE, TINY)
    monkeypatch.setattr(engine_products, "cache_bytes", lambda: 0)
    report = engine.Bench(tiny, 1, 0.0, quick=True).products()["products"]
    assert list(report["shapes"]) == [engine.QUICK_SHAPE]
    assert all(set(rows) == {1, 8, 32, 128} for rows in report["shapes"][engine.QUICK_SHAPE]["cpu_us"].values())


def test_a_product_slower_than_the_best_opponent_is_named() -> None:
    times_us = {"mesh-bf16": 3.0, "fbgemm-fp16": 2.0, "onednn-fp32": 4.0, "mesh-int8": 1.5}
    found = engine_products.judged_shape({"qkv": {1: times_us, 8: times_us | {"mesh-bf16": 1.0}}}, "mesh-bf16")
    assert found["vs_best"] == {"qkv x1": 0.67, "qkv x8": 2.0}
    report = judged({"products": {"shapes": {"100M": found}}})
    assert report["missed"] == [
        "products of 100M, vs_best, qkv x1: 0.67, asked 1.0",
        "products of 100M, mesh-int8 vs mesh-bf16, qkv x8: 0.67, asked 1.0",
    ]


def test_a_contender_holds_more_than_the_cache() -> None:
    contender = engine_products.contenders()["onednn-fp32"]
    model = engine_products.Model(contender, {"out": (64, 64)}, 5 * 64 * 64 * 4)
    assert model.layers == 5 and len(model.run(2)["out"]) == 4, "the first layer finds the caches as another kernel left them"


def test_the_thread_counts_of_llama_cpp_are_found_and_another_layout_is_refused() -> None:
    known = [512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, -1, -1, -1, -1, 0, 0]
    assert llama_api._threads_at(known) == 7
    assert llama_api._threads_at([512, 2048, 512, 1, 4, 4, *known[6:]]) == 4
    for other in ([0, *known], known[:7] + [0] * 9, [512, 2048, 512, 1]):
        with pytest.raises(RuntimeError, match="other parameters"):
            llama_api._threads_at(other)


@pytest.mark.skipif(bool(llama_side.absent()), reason="no llama.cpp here: make bench-peers")
def test_llama_cpp_decodes_what_transformers_does(tiny: Path) -> None:
    model = plain_model(tiny, torch.float32)
    loop = ForwardLoop(model, 3)
    for kind in ("f16", "bf16"):
        child = llama_side.LlamaCpp(llama_side.convert(tiny, kind), 1)
        try:
            side = child.begin(3, int(TINY["vocab_size"]), 128)
            assert side.first == loop.first and len(side.turn(4)) == 4
            assert all(step.cpu_s > 0 for step in side.turn(2))
        finally:
            child.close()
    assert "AVX" in child.about["features"] and child.about["version"]


def test_with_one_thread_rows_are_judged_by_cpu_time() -> None:
    row = {"batch": 1, "vs_hf": 1.9, "vs_hf_cpu_time": 2.1, "vs_llamacpp": 1.2, "vs_llamacpp_cpu_time": 0.9}
    row |= {"vs_generate_batch": 4.0, "bandwidth_fraction": 0.7}
    assert judged({"rows": [row], "judged_by": "cpu_time"})["missed"] == ["vs_llamacpp_cpu_time at batch 1: 0.9, asked 1.0"]
    assert judged({"rows": [row], "judged_by": "wall_time"})["missed"] == ["vs_hf at batch 1: 1.9, asked 2.0"]
    assert (judged_by(1).name, judged_by(2).name) == ("cpu_time", "wall_time")
    steps = {"slow on a busy machine": [Step(9.0, 1.0)], "other": [Step(2.0, 2.0)]}
    assert faster(steps, 1) == "slow on a busy machine" and faster(steps, 2) == "other" and faster({}, 1) == ""


def test_both_sides_read_the_same_prompt_to_the_same_token(tiny: Path) -> None:
    stage = load_stage(read_checkpoint(tiny), 0, 3, "float32", 1).stage
    ids = engine_prefill.prompt(int(TINY["vocab_size"]), 40)
    assert engine_prefill.read_by_us(stage, ids) == engine_prefill.read_by_transformers(plain_model(tiny, torch.float32), ids)


def test_a_step_behind_a_long_context_is_held_against_one_behind_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2}
    monkeypatch.setattr(engine_context, "SHAPE", engine_context.SHAPE | small)
    found = engine_context.measured(1, rounds=1, steps=3, far_tokens=640)
    assert found["context_step_ratio"] > 0 and set(found["context"]["cpu_ms"]) == {64, 640}


def test_behind_a_context_stand_as_many_keys_as_it_has_tokens(tiny: Path) -> None:
    stage = load_stage(read_checkpoint(tiny), 0, 3, "float32", 1).stage
    behind = engine_context.Behind(stage, 640)
    behind.step()
    (keys, *_) = behind._sequence.page(0, 641, [0])[0]
    assert keys.shape[1] == 641 and keys.abs().amax((0, 2)).min() > 0


def test_each_way_to_draw_is_timed() -> None:
    found = engine_sampler.measured(rounds=2, vocabulary=2000)["sampler"]
    assert set(found["cpu_ms"]) == set(engine_sampler.CASES) and found["vocabulary"] == 2000


def test_quantised_weights_are_held_against_the_stored_ones(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_side, "PYTHON", tiny / "no such python")
    stage = load_stage(read_checkpoint(tiny), 0, 3, "auto", 1).stage
    found = engine_quantised.measured(tiny, stage, engine_rows.Effort(1, 0.0, rounds=1), (1, 2))["quantised"]
    assert [row["batch"] for row in found["rows"]] == [1, 2] and "make bench-peers" in found["llamacpp"]
    for quantize, kind in engine_quantised.BESIDE.items():
        if quantize not in found["skipped"]:
            assert all(row[f"{quantize}_vs_stored"] > 0 and row[f"{quantize}_vs_{kind}"] is None for row in found["rows"])
    slow = {"quantised": {"rows": [{"batch": 8, "int8_vs_stored": 0.9, "int4_vs_stored": None}]}}
    assert judged(slow)["missed"] == ["int8_vs_stored at batch 8: 0.9, asked 1.0"]


CAPPED = """
import json, sys
from bench.capped import cap
capped = cap("avx2")
from node.engine.native.library import Isa, native
library = native()
print(json.dumps({"capped": capped, "isa": library.isa.name if library else "NONE", "again": sys.argv[1:]}))
"""


def test_a_capped_process_begins_anew_with_every_engine_capped(tmp_path: Path) -> None:
    script = tmp_path / "capped.py"
    script.write_text(CAPPED)
    environment = {name: value for name, value in os.environ.items() if name not in capped.ENVIRONMENT}
    root = str(Path(engine.__file__).parent.parent)
    said = subprocess.run(
        [sys.executable, str(script), "an argument"],
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    told = json.loads(said.stdout.splitlines()[-1])
    assert told["again"] == ["an argument"] and told["isa"] in ("AVX2", "NONE")
    assert told["capped"]["torch"] in ("AVX2", "DEFAULT") and told["capped"]["environment"] == capped.ENVIRONMENT
    assert told["capped"]["fbgemm"] == "avx2" or "not capped" in told["capped"]["fbgemm"]
    assert capped.cap("native") == {}
