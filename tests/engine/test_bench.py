"""bench.engine on a tiny model: everyone decodes the same model, and what is missing says so."""

import json
from pathlib import Path

import numpy
import pytest
import torch

from bench import engine, engine_exactness, engine_loading, llama_side
from bench.engine_exactness import freed
from bench.engine_shapes import make_checkpoint, prompts, weights_read_bytes
from bench.engine_sides import ForwardLoop, GenerateBatch, Ours, best_dtypes, plain_model
from bench.llama_child import Tensors, as_float32, turned
from node.engine import attention
from node.engine.attention import Segment, _cut
from node.engine.checkpoint import read_checkpoint
from node.engine.loading import load_stage

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


def test_every_side_in_this_process_decodes_the_same_tokens(tiny: Path):
    checkpoint = read_checkpoint(tiny)
    ours = Ours(load_stage(checkpoint, 0, 3, "float32", 1).stage, 3)
    model = plain_model(tiny, torch.float32)
    loop = ForwardLoop(model, 3)
    assert ours._next == loop.first
    assert len(ours.turn(4)) == len(loop.turn(4)) == 4
    assert ours._next == loop._next[:, 0].tolist()
    assert len(GenerateBatch(model, 3).turn(2)) == 3 * 2


def test_a_batch_repeats_the_prompts_of_a_smaller_one():
    assert prompts(3, 512)[:2] == prompts(2, 512)


def test_bits_that_a_batch_changes_are_told(tiny: Path):
    stage = load_stage(read_checkpoint(tiny), 0, 3, "float32", 1).stage
    alone, among = Ours(stage, 1), Ours(stage, 3)
    alone.turn(3), among.turn(2)
    assert engine.same_bits([alone, among])
    among.said[1] = b"another"
    assert not engine.same_bits([alone, among])


def test_a_step_reads_all_weights_but_embedding_and_norms(tiny: Path):
    model = plain_model(tiny, torch.bfloat16)
    counted = sum(weight.numel() for name, weight in model.named_parameters() if "norm" not in name and "embed" not in name)
    assert weights_read_bytes(model.config, 2) == 2 * counted


def test_freed_from_exactness_a_row_meets_the_keys_that_exist_and_no_more(tiny: Path):
    stage = load_stage(read_checkpoint(tiny), 0, 3, "float32", 1).stage
    row = Segment(0, 1, 70, stage.sequence())
    with freed():
        assert [tile.length for tile in _cut(row, 0)] == [71]
        assert attention.ROW_QUANTUM == 1
    assert [tile.length for tile in _cut(row, 0)] == [128]
    cost = engine_exactness.overhead(stage, {}, 70, 1, 0.0)
    assert set(cost["cpu_ms"]) == {"exact", "freed"} and cost["cpu"] > -1


def test_turned_rows_give_neighbours_what_halves_gave():
    """The rotation of pairs (2 i, 2 i + 1) of the turned rows is that of (i, i + half) of the others."""
    rows = numpy.arange(2 * 8 * 3).reshape(16, 3)  # two heads of eight
    after = turned(rows, 2).reshape(2, 4, 2, 3)
    before = rows.reshape(2, 2, 4, 3)
    assert (after[:, :, 0] == before[:, 0]).all() and (after[:, :, 1] == before[:, 1]).all()


def test_the_other_side_reads_the_weights_that_we_do(tiny: Path):
    tensors = Tensors(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in tensors
    read = torch.from_numpy(as_float32(tensors.bits(name)))
    assert torch.equal(read, plain_model(tiny, torch.float32).state_dict()[name])


def test_resident_memory_is_told_by_the_system_and_a_wrong_field_is_refused():
    assert 1 << 20 < engine_loading.resident_bytes("VmRSS") <= engine_loading.resident_bytes("VmHWM")
    with pytest.raises(ValueError, match="VmNone"):
        engine_loading.resident_bytes("VmNone")


def test_where_llama_cpp_is_absent_its_figures_are_null_and_the_report_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama_side, "PYTHON", tiny / "no such python")
    monkeypatch.setattr(engine, "BATCHES", (1, 2))
    monkeypatch.setattr(engine, "ROUNDS", 1)
    monkeypatch.setattr(engine_loading, "measured_apart", lambda directory: {"ratio": 1.25})
    monkeypatch.setattr("bench.bandwidth.MEASURED_BYTES", 1 << 20)
    report = json.loads(json.dumps(engine.measure(tiny, 1, 0.0)))
    assert [each["batch"] for each in report["rows"]] == [1, 2]
    for each in report["rows"]:
        assert each["llamacpp_tok_s"] is None and each["vs_llamacpp"] is None
        assert each["vs_hf"] > 0 and each["vs_generate_batch"] > 0 and each["bandwidth_fraction"] > 0
    assert set(report["invariance_overhead"]) == {"short", "long"}
    assert report["exact"] is True and report["peak_load_ratio"] == 1.25
    assert "make bench-peers" in report["llamacpp"]["absent"]


def test_the_faster_dtype_is_found_for_each_batch(tiny: Path):
    assert set(best_dtypes(tiny, (1, 2), 1)) == {1, 2}
