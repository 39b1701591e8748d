"""What an architecture is like inside is known before a weight is read: refused, served whole only, or served in parts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoConfig

from mesh.errors import BadRequest
from mesh.view import is_exact
from node.engine.api import EngineConfig
from node.engine.loading import kv_token_bytes, load_stage
from node.engine.model.attention import mesh_attention
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.structure import _structure, structure_of
from node.engine.model.unservable import Unservable
from node.engine.worker import TorchEngine
from tests.engine.checkpoints import COMMON, EXACT, NOT_SERVED, SHAPES, WHOLE_ONLY
from tests.engine.test_worker import MODEL, opening, running

REASONS = {
    "bloom": "positions are biases of attention scores (ALiBi)",
    "mpt": "positions are biases of attention scores (ALiBi)",
    "codegen": "its attention does not go through AttentionInterface",
    "xglm": "its attention does not go through AttentionInterface",
    "gpt_neox_japanese": "its attention does not go through AttentionInterface",
    "diffllama": "its layers call attention several times",
    "doge": "its attention has a mask of its own making",
    "bart": "it numbers the positions of its rows by itself",
}


@pytest.fixture
def config_of(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """A directory with the config of the named shape, and weights of another: nothing reads them."""

    def make(name: str) -> Path:
        directory = tmp_path / name
        shutil.copytree(checkpoint_of("llama"), directory)
        kind, own = SHAPES[name]
        AutoConfig.for_model(kind, **{**COMMON, **own}).save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize("name", REASONS)
def test_an_architecture_is_refused_by_name_and_reason_before_its_weights_are_looked_at(
    name: str, config_of: Callable[[str], Path]
) -> None:
    with pytest.raises(BadRequest) as refusal:
        structure_of(read_checkpoint(config_of(name)))
    said = str(refusal.value)
    assert f"{name} is {SHAPES[name][0]}, which cannot be served exactly: " in said and REASONS[name] in said
    assert "llama" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in (*EXACT, "jetmoe") if name not in NOT_SERVED])
def test_models_that_are_served_in_parts_pass_activations_alone(name: str, config_of: Callable[[str], Path]) -> None:
    assert structure_of(read_checkpoint(config_of(name))).whole_only == ""


@pytest.mark.parametrize("name", WHOLE_ONLY)
def test_a_model_whose_layers_are_given_more_than_activations_is_served_whole(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    engine = TorchEngine(EngineConfig(kv_memory_bytes=1 << 24))
    card = engine.inspect(checkpoint_of(name), MODEL)
    assert re.fullmatch("layer 1 is given per_layer_input(, shared_kv_states)? beside the activations", card.whole_only)
    for start, end in ((0, 2), (2, 4), (1, 3)):
        with pytest.raises(BadRequest, match=f"layers {start}:{end} of {name} cannot be served by themselves, for layer 1"):
            engine.load(checkpoint_of(name), MODEL, start, end)
    loaded = engine.load(checkpoint_of(name), MODEL, 0, 4)
    assert is_exact(loaded.numerics) and loaded.whole_only == card.whole_only


def test_ranks_do_not_share_a_model_that_is_served_whole(checkpoint_of: Callable[[str], Path]) -> None:
    with pytest.raises(BadRequest, match=r"gemma4 cannot be computed by 2 workers, for layer 1 is given .*--tensor-parallel"):
        load_stage(read_checkpoint(checkpoint_of("gemma4")), 0, 4, "float32", threads=1, ranks=2)


def test_a_part_of_a_path_through_a_model_that_is_served_whole_is_refused(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("gemma4"), 0, 4)) as one:
        for start, end in ((0, 2), (2, 4)):
            with pytest.raises(BadRequest, match=f"served whole only, not its layers {start}:{end}"):
                one.engine.open(opening("a", start, end))
        one.engine.open(replace(opening("a"), tokens=(5, 6, 7), known=3, prompt_tokens=3))


def test_layers_that_return_tuples_are_known(config_of: Callable[[str], Path]) -> None:
    assert structure_of(read_checkpoint(config_of("falcon"))).outputs == 2
    assert structure_of(read_checkpoint(config_of("llama"))).outputs == 0


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", [2 * 2 * 16] * 4),
        ("falcon", [2 * 1 * 16] * 4),  # one head of keys and values for all queries
        ("deepseek_v3", [2 * 4 * 24] * 4),  # keys of 24 numbers, values filled up to as many
        ("gemma4", [2 * 2 * 16, 2 * 2 * 32] * 2),
        ("jetmoe", [2 * 2 * 16] * 4),
    ],
)
def test_what_a_token_keeps_is_counted_layer_by_layer(name: str, layers: list[int], config_of: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(config_of(name))
    assert structure_of(checkpoint).kv_elements == tuple(layers)
    assert kv_token_bytes(checkpoint, 1, 3, torch.float32) == 4 * sum(layers[1:3])


def test_a_structure_is_found_once_for_each_config(config_of: Callable[[str], Path]) -> None:
    _structure.cache_clear()
    directory = config_of("llama")
    for _ in range(3):
        structure_of(read_checkpoint(directory))
    assert _structure.cache_info().misses == 1
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    structure_of(read_checkpoint(directory))
    assert _structure.cache_info().misses == 2


class EncoderAttention(torch.nn.Module):
    is_causal = False


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "a mask of its own making"),
        ({"is_causal": False}, "looks ahead"),
        ({"module": EncoderAttention()}, "looks ahead"),
        ({"position_bias": torch.zeros(3)}, "wants position_bias"),
    ],
)
def test_what_attention_is_given_and_does_not_read_is_never_passed_over(given: dict[str, Any], said: str) -> None:
    sides = [torch.zeros(1, 2, 3, 8) for _ in range(3)]
    with pytest.raises(Unservable, match=said):
        attend: Any = mesh_attention
        attend(given.pop("module", torch.nn.Identity()), *sides, **{"attention_mask": None, **given})
