"""A checkpoint is in memory as long as it is needed: layer by layer, and once."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh.errors import BadRequest
from mesh.view import is_exact
from node.checkpoints.safetensors_header import weight_files
from node.engine import loading, selfcheck
from node.engine.kernels import kernel_choice
from node.engine.kernels.kernel_choice import KernelChoice
from node.engine.loading import load_stage
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS, linear_modules
from node.engine.model.local_stage import LocalStage
from node.engine.model.mapped import MappedTensors
from node.engine.model.packing import SpanPacker
from node.engine.native.library import absence
from node.engine.selfcheck import SelfcheckInput, run_batch
from tests.engine.checkpoints import make_checkpoint
from tests.engine.offered import FLOAT32, needs_compiled, offered

KERNEL = FLOAT32 if absence() else "mesh-fp32"
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 128}
LAYER_BYTES = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 1024)
NEARBY_BYTES = 1 << 19  # what the kernel maps beside a page that is asked for, at both ends of some tensors

needs_linux = pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="asks Linux what is resident")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wide"), "llama", **WIDE)


@pytest.fixture
def mapped(wide: Path) -> Iterator[MappedTensors]:
    held = MappedTensors(weight_files(wide), widen_later=False)
    yield held
    held.close()


def resident_bytes(file: Path) -> int:
    """Of this process's mappings of the file."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            total += int(line.split()[1]) << 10 if ours and line.startswith("Rss:") else 0
        else:
            ours = line.endswith(str(file.resolve()))
    return total


@needs_linux
def test_what_was_let_go_takes_no_memory_and_is_there_again_when_it_is_read(wide: Path, mapped: MappedTensors) -> None:
    tensors = [late.to(dtype=torch.float32) for late in mapped.tensors.values()]
    assert sum(float(tensor.sum()) for tensor in tensors) and resident_bytes(wide / "model.safetensors") > 4 * LAYER_BYTES
    mapped.release(tensors)
    assert resident_bytes(wide / "model.safetensors") < NEARBY_BYTES
    true = load_file(wide / "model.safetensors")
    assert all(torch.equal(tensor, true[name]) for name, tensor in zip(mapped.tensors, tensors))


def test_what_is_no_part_of_a_file_is_never_let_go(mapped: MappedTensors) -> None:
    own = torch.ones(1 << 20)
    mapped.release([own])
    assert own.min() == 1
    next(iter(mapped.tensors.values())).to(dtype=torch.float32)
    mapped.close()
    other = torch.ones(1 << 20)  # may lie where the file was
    mapped.release([other])
    assert other.min() == 1


@needs_linux
@pytest.mark.parametrize("kernel", offered(FLOAT32, "mesh-fp32"))
def test_no_more_than_a_layer_is_in_memory_as_it_is_stored(kernel: str, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"ran": [], "packed": []}
    pack_layer = SpanPacker.layer

    def watched(self: SpanPacker, number: int) -> None:
        seen["ran"].append(resident_bytes(wide / "model.safetensors"))
        pack_layer(self, number)
        seen["packed"].append(resident_bytes(wide / "model.safetensors"))

    monkeypatch.setattr(SpanPacker, "layer", watched)
    loaded = load_stage(read_checkpoint(wide), 1, 4, kernel, threads=1)
    assert is_exact(loaded.numerics) and len(seen["ran"]) == 3
    assert min(seen["ran"]) > LAYER_BYTES / 2, "it was computed from the file"
    assert max(seen["ran"]) < LAYER_BYTES + 2 * NEARBY_BYTES
    assert max(seen["packed"]) < 2 * NEARBY_BYTES


@needs_compiled  # only our own kernel holds weights narrower than it computes
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_that_are_stored_narrower_are_widened_one_by_one_and_say_the_same(
    stored: torch.dtype, wide: Path, tmp_path: Path
) -> None:
    narrow, full = tmp_path / "narrow", tmp_path / "full"
    config = json.loads((wide / "config.json").read_text())
    tensors = {name: tensor.to(stored) for name, tensor in load_file(wide / "model.safetensors").items()}
    for directory, dtype in ((narrow, stored), (full, torch.float32)):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
        saved = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(saved, directory / "model.safetensors", {"format": "pt"})
    stages = [LocalStage(read_checkpoint(directory), 0, 4, KERNELS["mesh-fp32"], threads=1) for directory in (narrow, full)]
    dtypes = {layer.weight.dtype for _, _, layer in linear_modules(stages[0]._slots)}
    assert dtypes == {stored}, "as they are stored"
    assert stages[0].model.get_input_embeddings().weight.dtype is torch.float32
    plain = [selfcheck.pack_with_reference(stage) for stage in stages]
    assert torch.equal(*plain)
    assert torch.equal(*(run_batch(stage, [(SelfcheckInput(stage, 1, 40), 40)]) for stage in stages))


def test_only_the_files_that_the_index_names_are_read(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", shard="300KB")
    named = weight_files(directory)
    save_file({"model.norm.weight": torch.zeros(64)}, directory / "consolidated.safetensors")
    assert len(named) > 2 and weight_files(directory) == named
    assert is_exact(load_stage(read_checkpoint(directory), 3, 4, KERNEL, threads=1).numerics)
    for damaged in ("{", "[]", '{"weight_map": 3}'):
        (directory / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(BadRequest, match="is damaged"):
            weight_files(directory)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Each stage that a load builds, by kernel; at no time may there be two."""
    found: list[tuple[str, Any]] = []

    class Watched(LocalStage):
        def __init__(self, *given: Any) -> None:
            assert all(other() is None for _, other in found), "two stages at once"
            found.append((given[3].name, weakref.ref(self)))
            super().__init__(*given)

    monkeypatch.setattr(loading, "LocalStage", Watched)
    tries = KernelChoice((KERNELS["aten-fp32"], KERNELS["aten-bf16"]), "the first")
    monkeypatch.setattr(kernel_choice, "choose", lambda *given: tries)
    return found


def test_a_kernel_that_fails_is_gone_before_the_next_is_tried(
    wide: Path, built: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [False, True]
    monkeypatch.setattr(selfcheck, "matches_reference", lambda stage, plain: right.pop(0))
    loaded = load_stage(read_checkpoint(wide), 0, 1, "auto", threads=1)
    assert [name for name, _ in built] == ["aten-fp32", "aten-bf16"] and loaded.stage.kernel.name == "aten-bf16"
    assert loaded.choice.reason == "aten-fp32: differs from the plain model"
    assert loaded.choice.kernels == (KERNELS["aten-bf16"],)


def test_where_no_kernel_is_exact_the_first_that_is_right_serves(
    wide: Path, built: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfcheck, "is_exact", lambda stage: False)
    loaded = load_stage(read_checkpoint(wide), 0, 1, "auto", threads=1)
    assert [name for name, _ in built] == ["aten-fp32", "aten-bf16", "aten-fp32"]
    assert loaded.stage.kernel.name == "aten-fp32" and not is_exact(loaded.numerics)
    assert loaded.choice.reason == "none that was tried is exact"
    assert run_batch(loaded.stage, [(SelfcheckInput(loaded.stage, 1, 5), 5)]).isfinite().all(), "it is packed"
