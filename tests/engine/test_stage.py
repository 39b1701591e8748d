"""What a stage loads, what it refuses, and that it computes what the plain model does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.falcon import modeling_falcon

from mesh.errors import BadRequest
from mesh.view import is_exact
from node.engine import selfcheck
from node.engine.kv.cache import SequenceKV
from node.engine.loading import load_stage
from node.engine.model.attention import NAME, Segment, mesh_attention
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.model.local_stage import LocalStage
from tests.engine.checkpoints import COMMON, EXACT, make_checkpoint
from tests.engine.offered import FLOAT32


def stage_of(directory: Path, start: int, end: int) -> LocalStage:
    return LocalStage(read_checkpoint(directory), start, end, KERNELS[FLOAT32], threads=1)


@pytest.mark.torchs_kernel
@pytest.mark.parametrize("name", EXACT)
def test_ragged_rows_match_the_plain_model(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of(name)
    stage = stage_of(directory, 0, 4)
    stage.pack()
    attention = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()
    prompts = [torch.randint(3, 500, (count,), generator=torch.Generator().manual_seed(count)).tolist() for count in (5, 41, 67)]
    caches = [stage.sequence() for _ in prompts]
    for count, done in ((4, 0), (None, 4)):
        segments: list[Segment] = []
        positions: list[int] = []
        ids: list[int] = []
        upto: list[int] = []
        for prompt, cache in zip(prompts, caches):
            end = len(prompt) if count is None else done + count
            segments.append(Segment(len(positions), end - done, done, cache))
            positions += range(done, end)
            ids += prompt[done:end]
            upto.append(end)
        logits = stage.forward(0, 4, segments, positions, ids=ids, logits_at=range(len(ids)))
        for segment, prompt, end in zip(segments, prompts, upto):
            with torch.inference_mode():
                expected = plain(torch.tensor([prompt[:end]])).logits[0, done:end]
            torch.testing.assert_close(logits[segment.row : segment.row + segment.count], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.torchs_kernel
def test_a_span_loads_its_own_tensors_and_no_others(checkpoint_of: Callable[[str], Path]) -> None:
    def count(name: str, start: int, end: int) -> int:
        return int(stage_of(checkpoint_of(name), start, end).parameters)

    hidden, vocab = COMMON["hidden_size"], COMMON["vocab_size"]
    layer = (count("llama", 1, 3) - hidden) // 2  # the final norm is small and stays everywhere
    assert layer == 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * 176 + 2 * hidden
    assert count("llama", 0, 4) == 4 * layer + hidden + 2 * vocab * hidden
    assert count("llama", 0, 1) == layer + hidden + vocab * hidden
    assert count("llama", 3, 4) == layer + hidden + vocab * hidden
    assert count("llama_tied", 0, 4) == 4 * layer + hidden + vocab * hidden
    assert count("llama_tied", 3, 4) == layer + hidden + vocab * hidden  # the embedding is the head
    assert count("llama_tied", 2, 3) == layer + hidden


def test_a_sharded_tied_checkpoint_is_read_across_its_files(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama_tied", shard="300KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    loaded = load_stage(read_checkpoint(directory), 2, 4, "float32", threads=1)
    assert is_exact(loaded.numerics)


@pytest.mark.torchs_kernel
def test_the_self_check_notices_attention_that_forgets(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(checkpoint_of("llama"), 0, 4)
    plain = selfcheck.reference_output(stage)
    stage.pack()
    assert selfcheck.matches_reference(stage, plain) and selfcheck.is_exact(stage)
    write = SequenceKV.write

    def forgetful(self: SequenceKV, layer: int, position: int, kv: torch.Tensor) -> None:
        write(self, layer, position, kv * (position < 10))

    monkeypatch.setattr(SequenceKV, "write", forgetful)
    assert not selfcheck.matches_reference(stage, plain)
    assert not selfcheck.is_exact(stage)


def test_experts_in_the_common_form_are_exact_at_load(checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(checkpoint_of("mixtral"))
    assert checkpoint.mixture
    numerics = {load_stage(checkpoint, 0, 4, "float32", threads=1).numerics for _ in range(2)}
    assert len(numerics) == 1 and is_exact(numerics.pop())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_of_another_form_are_served_but_promise_no_equal_tokens(dtype: str, checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(checkpoint_of("jetmoe"))
    numerics = {load_stage(checkpoint, 0, 4, dtype, threads=1).numerics for _ in range(2)}
    assert len(numerics) == 2 and not any(map(is_exact, numerics)), "not even two loads on one machine"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_next", "a hybrid with layers that carry a state other than keys and values"),
        ("mamba", "a hybrid with layers that carry a state other than keys and values"),
        ("bert", "set up as an encoder, which looks ahead"),
    ],
)
def test_models_that_cannot_be_exact_are_refused_by_name_and_reason(
    name: str, reason: str, checkpoint_of: Callable[[str], Path]
) -> None:
    with pytest.raises(BadRequest, match=f"{name}.*{reason}.*llama") as refusal:
        read_checkpoint(checkpoint_of(name))
    assert refusal.value.param == "model"


def test_a_model_that_counts_positions_from_elsewhere_is_found_out_by_the_self_check(
    checkpoint_of: Callable[[str], Path],
) -> None:
    """RoBERTa's first token stands at the position behind its padding token's number; a stage counts from 0."""
    with pytest.raises(BadRequest, match=r"roberta.*failed the self-check on layers 0:4: differs from the plain model \("):
        load_stage(read_checkpoint(checkpoint_of("roberta")), 0, 4, "float32", threads=1)


def test_an_attention_of_the_old_kind_is_refused_at_load(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(modeling_falcon.FALCON_ATTENTION_CLASSES, NAME)
    with pytest.raises(BadRequest, match=r"falcon.*does not go through AttentionInterface.*llama"):
        load_stage(read_checkpoint(checkpoint_of("falcon")), 0, 4, "auto", threads=1)


@pytest.mark.torchs_kernel
@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt_oss"])
def test_a_window_that_does_not_reach_the_attention_is_refused_though_the_probe_is_shorter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(make_checkpoint(tmp_path, name, sliding_window=64))
    assert selfcheck.PROBE_TOKENS < 64
    assert is_exact(load_stage(checkpoint, 0, 4, FLOAT32, threads=1).numerics)

    def forgetful(*given: Any, sliding_window: int | None = None, **more: Any) -> Any:
        return mesh_attention(*given, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, forgetful)
    monkeypatch.setattr("node.engine.model.packing.fuse_llama", lambda *span: None)
    with pytest.raises(BadRequest, match=f"{name}.*its sliding window does not reach the attention"):
        load_stage(checkpoint, 0, 4, FLOAT32, threads=1)


def test_directories_that_are_no_servable_checkpoints_are_refused(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no such model directory"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(BadRequest, match="is empty"):
        read_checkpoint(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BadRequest, match=r"no config\.json"):
        read_checkpoint(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_of("llama"), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5])
    with pytest.raises(BadRequest, match="cut short"):
        read_checkpoint(broken)
    weights.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(BadRequest, match="cut short"):
        read_checkpoint(broken)
    weights.unlink()
    with pytest.raises(BadRequest, match=r"no \*\.safetensors files"):
        read_checkpoint(broken)
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadRequest, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        read_checkpoint(broken)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"alibi": True}, "llama with ALiBi"),
        ({"attention_chunk_size": 8192}, "cut into chunks"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "no_such_model"}, "no_such_model, an architecture that transformers .* does not have"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic NTK"),
    ],
)
def test_configs_that_cannot_be_served_are_refused(
    change: dict[str, object], reason: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tmp_path / "changed"
    shutil.copytree(checkpoint_of("llama"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadRequest, match=reason):
        read_checkpoint(directory)


def test_missing_tensors_and_layers_out_of_range_are_refused(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = read_checkpoint(checkpoint_of("llama"))
    for start, end in ((0, 5), (2, 2), (-1, 3)):
        with pytest.raises(BadRequest, match="layers within 0:4"):
            load_stage(checkpoint, start, end, "auto", threads=1)
    with pytest.raises(BadRequest, match="expected auto, float32"):
        load_stage(checkpoint, 0, 4, "float8", threads=1)
    deeper = tmp_path / "deeper"
    shutil.copytree(checkpoint_of("llama"), deeper)
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(BadRequest, match="the checkpoint lacks"):
        load_stage(read_checkpoint(deeper), 0, 5, "auto", threads=1)
    assert stage_of(deeper, 0, 4).parameters > 0, "layers that are there can be served"


def test_one_other_byte_of_weights_or_config_is_another_model_with_another_fingerprint(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    original = checkpoint_of("llama")
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    same = load_stage(read_checkpoint(original), 1, 2, "float32", threads=1).numerics
    assert load_stage(read_checkpoint(copy), 1, 2, "float32", threads=1).numerics == same
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[len(raw) // 2 + 5000] ^= 1  # a byte that samples of a few pieces of the file would miss
    (copy / "model.safetensors").write_bytes(raw)
    other = read_checkpoint(copy)
    assert other.weights != read_checkpoint(original).weights
    assert load_stage(other, 1, 2, "float32", threads=1).numerics != same
    config = json.loads((original / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9.9"}))
    shutil.copy(original / "model.safetensors", copy)
    assert read_checkpoint(copy).weights != read_checkpoint(original).weights, "a tokenizer may go by that version"
    assert read_checkpoint(copy, "told").weights == "told", "what the node knows is not hashed again"


def test_two_threads_of_torch_are_exact_too_and_promise_nothing_about_one(random_model: Path) -> None:
    checkpoint = read_checkpoint(random_model)
    one = load_stage(checkpoint, 0, 3, "aten-fp32", threads=1)
    torch.set_num_threads(2)
    try:
        two = load_stage(checkpoint, 0, 3, "aten-fp32", threads=2)
    finally:
        torch.set_num_threads(1)
    assert is_exact(two.numerics) and two.numerics != one.numerics
