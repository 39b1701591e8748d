"""What people give to `--model` and cannot be served: one line of reason and what would work, before the node is announced."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from typer.testing import CliRunner, Result

import node.main
from cli.main import app
from node.config import NodeConfig
from tests.engine.checkpoints import make_checkpoint
from tests.engine.random_model import TOKENIZER

SHARDS = "model-{:05d}-of-00005.safetensors"
INDEX = "model.safetensors.index.json"


class Started(Exception):
    """A node was about to run."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A servable checkpoint in five files, with a tokenizer."""
    directory = make_checkpoint(tmp_path_factory.mktemp("good"), "llama", shard="300KB", vocab_size=2048)
    shutil.copyfile(TOKENIZER, directory / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert len(list(directory.glob("*.safetensors"))) == 5
    return directory


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """`mesh up --model …` as far as the node's start, which raises Started; no socket is opened and nothing is written."""

    async def make(config: NodeConfig) -> None:
        await trio.to_thread.run_sync(node.main._prepare, config, tmp_path / "data", 1 << 30)
        raise Started

    def run(*options: str) -> Result:
        return CliRunner().invoke(app, ["up", *options])

    monkeypatch.setattr(node.main, "_make", make)
    handler, threshold = signal.getsignal(signal.SIGTERM), gc.get_threshold()
    yield run
    signal.signal(signal.SIGTERM, handler)
    gc.set_threshold(*threshold)


def reason(result: Result) -> str:
    """The one line that says why; nothing else was said but the log."""
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert "Traceback" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("mesh: ")]
    assert len(said) == 1 and result.stderr.endswith(said[0] + "\n"), result.stderr
    return said[0]


def test_a_good_checkpoint_comes_as_far_as_the_start(model: Path, up: Callable[..., Result]) -> None:
    result = up("--model", str(model))
    assert isinstance(result.exception, BaseExceptionGroup) and result.exception.subgroup(Started), result.output


# ---- damage: what is done to a good checkpoint, and what is said of it

Damage = Callable[[Path], object]


def change(**values: Any) -> Damage:
    """Of config.json; None takes a key out."""

    def damage(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        changed = {key: value for key, value in (config | values).items() if value is not None}
        (model / "config.json").write_text(json.dumps(changed))

    return damage


def write(name: str, content: str) -> Damage:
    return lambda model: (model / name).write_text(content)


def remove(*names: str) -> Damage:
    def damage(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return damage


def all_of(*damages: Damage) -> Damage:
    return lambda model: [damage(model) for damage in damages]


def dangling(name: str) -> Damage:
    """A link whose file is gone, as the hub cache has them after its files were moved."""

    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(model / "no-such-blob")

    return damage


def folder(name: str) -> Damage:
    """A directory where a file is expected: the operating system refuses to read it."""

    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).mkdir()

    return damage


def remap(tensor: str, file: str) -> Damage:
    """Another file for one tensor of the index."""

    def damage(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][tensor] = file
        (model / INDEX).write_text(json.dumps(index))

    return damage


def header(change_of: Callable[[dict[str, Any]], object]) -> Damage:
    """Of the first shard, its data as they were."""

    def damage(model: Path) -> None:
        path = model / SHARDS.format(1)
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        tensors = json.loads(raw[8 : 8 + size])
        change_of(tensors)
        changed = json.dumps(tensors).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + size :])

    return damage


def first_tensor(**values: Any) -> Damage:
    return header(lambda tensors: next(t for name, t in tensors.items() if name != "__metadata__").update(values))


def cut(name: str, size_bytes: int) -> Damage:
    return lambda model: os.truncate(model / name, size_bytes)


def quantised(method: str, **more: Any) -> Damage:
    return change(quantization_config={"quant_method": method, **more})


def only(*names: str) -> Damage:
    """A directory of these files alone, as good as empty."""

    def damage(model: Path) -> None:
        for path in model.iterdir():
            path.unlink()
        for name in names:
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_text("{}")

    return damage


EMBEDDING = "model.embed_tokens.weight"
EVERY_SHARD = tuple(SHARDS.format(number) for number in range(1, 6))
DAMAGES: dict[str, tuple[Damage, str]] = {
    # files that are missing or cannot be read
    "an empty directory": (only(), "is empty; expected a directory"),
    "no config.json": (remove("config.json"), "has no config.json; expected a directory"),
    "a missing shard": (remove(SHARDS.format(2)), f"{SHARDS.format(2)} is missing from model, and {INDEX} names it"),
    "a missing shard and no index": (remove(SHARDS.format(2), INDEX), f"{SHARDS.format(2)} is missing from model"),
    "a missing last shard": (remove(SHARDS.format(5), INDEX), f"{SHARDS.format(5)} is missing from model"),
    "a shard whose blob is gone": (dangling(SHARDS.format(2)), f"{SHARDS.format(2)} is missing from model"),
    "weights whose blob is gone": (
        all_of(remove(*EVERY_SHARD, INDEX), dangling("model.safetensors")),
        "model.safetensors of model leads to no file",
    ),
    "no weights": (remove(*EVERY_SHARD, INDEX), r"has no \*\.safetensors files; download the weights"),
    "pickled weights": (
        all_of(remove(*EVERY_SHARD, INDEX), write("pytorch_model.bin", "")),
        r"pickled weights \(pytorch_model\.bin\).*save_pretrained",
    ),
    "a config that is a directory": (folder("config.json"), "config.json cannot be read: Is a directory"),
    "a config whose blob is gone": (dangling("config.json"), "config.json cannot be read: No such file"),
    "an index that is a directory": (folder(INDEX), f"{INDEX} cannot be read: Is a directory"),
    # damaged files
    "a cut config": (cut("config.json", 40), r"config\.json of model is damaged: .*download it again"),
    "a config that is a list": (write("config.json", "[]"), r"config\.json of model is damaged: expected an object"),
    "a config of no kind": (change(model_type=None), "does not say its model_type"),
    "a cut index": (cut(INDEX, 60), rf"{INDEX} of model is damaged"),
    "an index without a map": (write(INDEX, '{"weight_map": []}'), rf"{INDEX} of model is damaged"),
    "a cut shard": (cut(SHARDS.format(1), 1000), r"(cut short|damaged).*download it again"),
    "a shard of no bytes": (cut(SHARDS.format(1), 0), "is not a safetensors file or is cut short"),
    "a header that is no JSON": (header(lambda tensors: tensors.update(x=1)), "header of .* is damaged"),
    "data before the file": (first_tensor(data_offsets=[-4, 4]), "header of .* is damaged"),
    "data beyond the file": (first_tensor(data_offsets=[0, 1 << 40]), "cut short: expected"),
    "a shape that does not fit": (first_tensor(shape=[3, 3]), "another size than its shape says"),
    "a cut generation config": (write("generation_config.json", "{"), "generation config of model cannot be read"),
    # an index that leads elsewhere
    "an index that climbs out": (remap(EMBEDDING, "../model.safetensors"), r"names the file '\.\./model\.safetensors'; expected"),
    "an absolute index": (remap(EMBEDDING, "/etc/hostname"), "names the file '/etc/hostname'; expected"),
    "an index of pickles": (remap(EMBEDDING, "pytorch_model.bin"), r"names the file 'pytorch_model\.bin'; expected"),
    "an index of numbers": (remap(EMBEDDING, 3), "names the file '3'; expected"),  # type: ignore[arg-type]
    "an index that is wrong": (remap(EMBEDDING, SHARDS.format(5)), f"lacks the tensor {EMBEDDING}, which {INDEX} says"),
    # what is no whole model, or in another format
    "an adapter": (only("adapter_config.json", "adapter_model.safetensors"), "is an adapter, no whole model; .*merge_and_unload"),
    "an adapter of a base": (
        all_of(only(), write("adapter_config.json", '{"base_model_name_or_path": "org/base"}')),
        "is an adapter of org/base, no whole model",
    ),
    "an adapter beside its base": (
        write("adapter_config.json", '{"base_model_name_or_path": "org/base"}'),
        "has an adapter of org/base beside its weights.*merge_and_unload.*to serve the base alone",
    ),
    "an adapter's weights beside a base": (write("adapter_model.safetensors", ""), "has an adapter beside its weights"),
    "GGUF files": (only("model-q4.gguf"), r"no config\.json but model-q4\.gguf: GGUF files are not served; give the safetensors"),
    "GGUF files with a config": (
        all_of(remove(*EVERY_SHARD, INDEX), write("model-q4.gguf", "")),
        r"no \*\.safetensors files but model-q4\.gguf: GGUF files are not served",
    ),
    "Meta's own format": (only("params.json", "consolidated.00.pth"), "Meta's or Mistral's own format"),
    "a diffusers pipeline": (only("model_index.json"), "a diffusers pipeline"),
    "a directory of models": (only("b/config.json", "a/config.json", "c/x"), "and a, b below it have; give one of them"),
    "a hub cache": (only("models--org--name/x"), r"hub cache; give the snapshot of one.*models--org--name/snapshots/"),
    "a model's folder in a hub cache": (
        all_of(only("snapshots/abc/x", "snapshots/def/x", "refs/main"), write("refs/main", "abc")),
        "model's folder in the hub cache; give its snapshot: .*/snapshots/abc$",
    ),
    "an embedding model": (
        all_of(write("modules.json", "[]"), lambda model: (model / "1_Pooling").mkdir()),
        "is an embedding model of sentence-transformers",
    ),
    # quantised ahead of time
    "GPTQ": (quantised("gptq", bits=4), r"quantised with GPTQ \(4 bits\), which is not served; give the unquantised"),
    "AWQ": (quantised("awq", bits=4), r"with AWQ \(4 bits\)"),
    "FP8": (quantised("fp8"), "to FP8, which"),
    "FBGEMM FP8": (quantised("fbgemm_fp8"), r"to FP8 \(FBGEMM\)"),
    "MXFP4": (quantised("mxfp4"), "to MXFP4"),
    "compressed-tensors": (quantised("compressed-tensors"), "with compressed-tensors"),
    "older compressed-tensors": (change(compression_config={"quant_method": "compressed-tensors"}), "with compressed-tensors"),
    "bitsandbytes": (change(quantization_config={"load_in_4bit": True}), r"with bitsandbytes \(4 bits\)"),
    "bitsandbytes by name": (quantised("bitsandbytes", load_in_8bit=True), r"with bitsandbytes \(8 bits\)"),
    "quanto": (quantised("quanto", weights="int8"), "with quanto"),
    "HQQ": (quantised("hqq"), "with HQQ"),
    "torchao": (quantised("torchao"), "with torchao"),
    "ModelOpt": (quantised("modelopt", quant_algo="NVFP4"), r"with NVIDIA ModelOpt \(NVFP4\)"),
    "MLX": (change(quantization={"group_size": 64, "bits": 4}), r"with MLX \(4 bits\)"),
    "a method of tomorrow": (quantised("qqq9"), "with qqq9, which is not served"),
    "a method without a name": (change(quantization_config={"bits": 3}), r"an unnamed method \(3 bits\)"),
    "an older GPTQ": (write("quantize_config.json", '{"bits": 4}'), r"with GPTQ \(4 bits\)"),
    "an older AWQ": (write("quant_config.json", '{"w_bit": 4}'), r"with AWQ \(4 bits\)"),
    "a text model within a quantised one": (change(text_config={"quantization_config": {"quant_method": "gptq"}}), "with GPTQ"),
    "FP8 weights without a word": (first_tensor(dtype="F8_E4M3"), "to FP8, which"),
    # kinds of model
    "an encoder-decoder": (change(model_type="t5", architectures=None), "is t5, an encoder-decoder"),
    "an encoder": (change(model_type="bert", architectures=["BertModel"]), "bert set up as an encoder"),
    "a classifier": (change(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification, not a causal"),
    "an unknown architecture": (change(model_type="newest"), r"newest, an architecture that transformers \S+ does not have; a"),
    "code of its own": (
        change(model_type="newest", auto_map={"AutoConfig": "a.B"}),
        "is newest, .* does not have, and the Python code in its directory is never run",
    ),
    "a model that sees": (
        change(model_type="llava", architectures=["LlavaForConditionalGeneration"], text_config={"model_type": "llama"}),
        r"LlavaForConditionalGeneration, a model of more than text \(vision_config\); only models of text",
    ),
    "MPT": (change(model_type="mpt", architectures=None, d_model=64, n_layers=4, n_heads=4), r"is mpt, .*\(ALiBi\); a llama"),
    "BLOOM": (change(model_type="bloom", architectures=None, n_layer=4, n_head=4), r"is bloom, .*\(ALiBi\); a llama"),
    "CodeGen": (
        change(model_type="codegen", architectures=None, n_embd=64, n_layer=4, n_head=4, rotary_dim=8),
        "is codegen, .*: its attention does not go through AttentionInterface; a llama",
    ),
    "DiffLlama": (
        change(model_type="diffllama", architectures=None),
        "is diffllama, .*: its layers call attention several times",
    ),
    # tensors that are not those of the config
    "a layer that is not there": (
        change(num_hidden_layers=5),
        r"the checkpoint lacks model\.layers\.4\.input_layernorm\.weight, .* and 6 more",
    ),
    "another width": (
        change(intermediate_size=200),
        r"other shapes than its config says: model\.layers\.0\.mlp\.down_proj\.weight is \[64, 176\], expected \[64, 200\], ",
    ),
    # tokenizers
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        r"model holds no tokenizer: expected tokenizer\.json.*copy",
    ),
    "a cut tokenizer": (cut("tokenizer.json", 1000), r"tokenizer of model cannot be read: .*copy"),
    "a tokenizer config that is a list": (write("tokenizer_config.json", "[]"), r"tokenizer of model cannot be read: "),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_cannot_be_served_is_refused_in_one_line_before_the_node_is_announced(
    kind: str, model: Path, up: Callable[..., Result]
) -> None:
    damage, said = DAMAGES[kind]
    damage(model)
    found = reason(up("--model", str(model)))
    assert re.search(said, found), found


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("name", [".", "config.json", SHARDS.format(1), INDEX])
def test_what_this_user_may_not_read_is_named(name: str, model: Path, up: Callable[..., Result]) -> None:
    (model / name).chmod(0)
    try:
        assert "cannot be read: Permission denied" in reason(up("--model", str(model)))
    finally:
        (model / name).chmod(0o700)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("missing", "there is no directory"),
        ("model/config.json", "config.json is a file; give its directory, "),
        ("model/tokenizer.json/x", "there is no directory"),
        ("loose.gguf", "loose.gguf is a GGUF file; GGUF files are not served; give the safetensors checkpoint"),
        ("loose.safetensors", "loose.safetensors is a file; expected a directory"),
        ("=model", "expected a name for the model"),
    ],
)
def test_a_reference_to_no_directory_is_refused(given: str, said: str, model: Path, up: Callable[..., Result]) -> None:
    for name in ("loose.gguf", "loose.safetensors"):
        (model.parent / name).touch()
    path = f"={model}" if given == "=model" else str(model.parent / given)
    assert said in reason(up("--model", path))


def test_two_models_of_one_name_are_refused(model: Path, up: Callable[..., Result]) -> None:
    other = Path(shutil.copytree(model, model.parent / "elsewhere" / "model"))
    assert "model is given twice; give one of them another name with NAME=DIR" in reason(
        up("--model", str(model), "--model", str(other))
    )
