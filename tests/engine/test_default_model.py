"""The default model: the same bytes everywhere, and safe to make by several nodes at once."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from transformers import AutoTokenizer

from node.engine.checkpoint import read_checkpoint
from node.engine.default_model import ensure_default_model, ensure_random_model
from node.engine.default_shape import LAYERS, MAX_MODEL_LEN

WEIGHTS_SHA256 = "4a4d52fdf7bb23d8"


def test_its_weights_are_pinned_to_the_byte(mesh_demo: Path) -> None:
    assert hashlib.sha256((mesh_demo / "model.safetensors").read_bytes()).hexdigest().startswith(WEIGHTS_SHA256)


def test_it_is_what_the_manual_says(mesh_demo: Path) -> None:
    checkpoint = read_checkpoint(mesh_demo)
    assert (checkpoint.layers, checkpoint.hidden_size, checkpoint.max_model_len) == (6, 256, 4096)
    assert checkpoint.config.num_attention_heads == 8 and checkpoint.config.num_key_value_heads == 4
    assert checkpoint.end_ids == {0, 2}


def test_several_nodes_may_make_it_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(3)
    made: list[Path] = []

    def make() -> None:
        barrier.wait()
        made.append(ensure_random_model(tmp_path))

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [recipe] = tmp_path.iterdir()
    assert made == [recipe / "mesh-demo"] * 3
    assert [path.name for path in recipe.iterdir()] == ["mesh-demo"], "nothing is left aside"
    assert ensure_random_model(tmp_path) == made[0]


def test_a_trained_model_in_the_package_goes_before_the_random_one(tmp_path: Path) -> None:
    trained, cache = tmp_path / "trained", tmp_path / "cache"
    assert ensure_default_model(cache, trained).is_relative_to(cache)
    trained.mkdir()
    (trained / "config.json").write_text("{}")
    assert ensure_default_model(cache, trained) == trained


def test_its_tokenizer_gives_back_any_text_and_knows_chat(mesh_demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(mesh_demo)
    for text in ("Hello, mesh!", "naïve 李白 🦊\n\n\tif x:  return", " leading and trailing ", "<|not special|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 2048
    assert len(tokenizer.encode("the function returns a list of names")) <= 9
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]


def test_its_template_shows_tools_and_their_calls(mesh_demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(mesh_demo)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], add_generation_prompt=True, tokenize=False)
    assert text.count("Be brief.") == 1 and text.count("<|im_start|>system") == 1
    assert '"name": "add"' in text and '"arguments": {"a": 1}' in text
    assert text.endswith("<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n")


def test_what_is_said_of_the_model_before_it_is_made_is_true(mesh_demo: Path) -> None:
    checkpoint = read_checkpoint(mesh_demo)
    assert (checkpoint.layers, checkpoint.max_model_len) == (LAYERS, MAX_MODEL_LEN)
