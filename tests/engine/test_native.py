"""The compiled kernel: the same bits on every instruction set, and what is done where it cannot be built."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mesh.view import is_exact
from node.engine.kernels import kernel_choice, machine
from node.engine.kernels.kernel_probe import refusal
from node.engine.loading import load_stage
from node.engine.model.attention import Segment
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.compiled_layers import Interleaved, NativeLayers
from node.engine.model.linear import KERNELS, linear_modules
from node.engine.model.local_stage import LocalStage
from node.engine.native import build, product
from node.engine.native.build import CannotBuild, built
from node.engine.native.library import Isa, NativeLibrary, WeightKind, native
from node.engine.native.product import NativeProduct, int4_of, int8_of
from node.engine.selfcheck import distance_to_reference, reference_output
from tests.engine.offered import FLOAT32, needs_compiled


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    found = native()
    assert found is not None
    yield found
    found.use(found.isa)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def isas(library: NativeLibrary) -> list[Isa]:
    return [isa for isa in Isa if Isa.NONE < isa <= library.isa]


@needs_compiled
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(100, 72), (33, 320)], ids=str)
def test_a_row_has_the_same_bits_on_every_instruction_set_in_any_company_and_with_any_threads(
    shape: tuple[int, int], dtype: torch.dtype, quantize: str, library: NativeLibrary
) -> None:
    weight, bias, rows = numbers(*shape), numbers(shape[0], seed=2), numbers(300, shape[1], seed=3).to(dtype)
    product = NativeProduct(weight.to(dtype), bias.to(dtype), quantize)
    whole = product(rows)
    assert not torch.isnan(whole).any()
    for isa in isas(library):
        assert library.use(isa) == isa
        for first, count in ((0, 1), (7, 2), (2, 3), (40, 17), (3, 33), (0, 257), (0, 300)):
            assert torch.equal(product(rows[first : first + count]), whole[first : first + count]), (isa, count)
        torch.set_num_threads(2)
        try:
            assert torch.equal(product(rows), whole)
        finally:
            torch.set_num_threads(1)


@needs_compiled
def test_numbers_at_the_edges_of_their_range_come_out_alike_too(library: NativeLibrary) -> None:
    weight, rows = numbers(32, 64), numbers(4, 64, seed=2)
    weight[3] = 1e-39  # denormal: counts as zero, whatever it is multiplied by
    rows[1] *= 1e-30
    rows[2] *= 1e30
    rows[3, 5] = float("nan")
    product = NativeProduct(weight.bfloat16(), None)
    outs = []
    for isa in isas(library):
        library.use(isa)
        outs.append(product(rows.bfloat16()))
    for out in outs:
        assert torch.equal(out[:3], outs[0][:3])
        assert out[3].isnan().all() and not out[:3].isnan().any(), "one row's NaN stays its own"
        assert (out[:3, 3] == 0).all()


@needs_compiled
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_rows_that_cannot_be_rounded_have_no_result_and_leave_their_neighbours_theirs(
    quantize: str, library: NativeLibrary
) -> None:
    rows = numbers(7, 80, seed=2)
    product = NativeProduct(numbers(40, 80), None, quantize)
    whole = product(rows)
    rows[1, 3], rows[4, 79], rows[6] = float("nan"), float("inf"), 1e-38  # the last: denormal, and so zero
    for isa in isas(library):
        library.use(isa)
        out = product(rows)
        assert out[[1, 4]].isnan().all()
        assert (out[6] == 0).all()
        assert torch.equal(out[[0, 2, 3, 5]], whole[[0, 2, 3, 5]])


@needs_compiled
def test_a_product_is_whole_when_the_call_returns_however_many_threads_worked_on_it() -> None:
    product, rows = NativeProduct(numbers(512, 512), None), numbers(128, 512, seed=2)  # a thread's share takes a millisecond
    whole = product(rows)
    torch.set_num_threads(2)
    try:
        for _ in range(30):  # in turns, for new tensors take up the room of old ones and what was in it
            assert torch.equal(product(rows), whole)
            assert torch.equal(product(-rows), -whole)
    finally:
        torch.set_num_threads(1)


@needs_compiled
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_compiled_layers_compute_what_the_plain_model_does(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    for start, end in ((0, 4), (1, 3)):
        stage = LocalStage(read_checkpoint(checkpoint_of(name)), start, end, KERNELS["mesh-fp32"], threads=1)
        for parameter, tensor in stage.model.named_parameters():
            if "norm" in parameter:
                tensor.copy_(1 + numbers(*tensor.shape) / 2)  # as made they are all ones
        plain = reference_output(stage)
        stage.pack()
        assert isinstance(stage.fused, NativeLayers)
        assert distance_to_reference(stage, plain) < 1e-4


@needs_compiled
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("kernel", ["mesh-bf16", "mesh-fp32", "mesh-int8"])
def test_compiled_layers_give_the_same_bits_on_every_instruction_set(
    name: str, kernel: str, library: NativeLibrary, checkpoint_of: Callable[[str], Path]
) -> None:
    stage = LocalStage(read_checkpoint(checkpoint_of(name)), 0, 4, KERNELS[kernel], threads=1)
    stage.pack()
    assert isinstance(stage.fused, NativeLayers)
    ids = torch.randint(0, 500, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    outs = []
    for isa in isas(library):
        library.use(isa)
        segments = [Segment(0, 19, 0, stage.sequence())]
        outs.append(stage.forward(0, 4, segments, range(19), ids=ids, logits_at=range(19)).clone())
    assert all(torch.equal(out, outs[0]) for out in outs)


@needs_compiled
def test_weights_are_held_in_as_few_bytes_as_hold_them_exactly() -> None:
    weight = numbers(32, 32)
    assert NativeProduct(weight, None).kind is WeightKind.FP32
    assert NativeProduct(weight.half().float(), None).kind is WeightKind.FP16
    assert NativeProduct(weight.bfloat16().float(), None).kind is WeightKind.BF16
    kept = NativeProduct(weight.bfloat16().float(), None)(torch.eye(32))
    assert torch.equal(kept.t(), weight.bfloat16().float()), "float32 rows meet the weights unrounded"


def rounded_by_32(rows: torch.Tensor) -> torch.Tensor:
    """Rows `[…, inputs]` as a quantised product takes them: whole numbers of eight bits times one scale for 32 inputs."""
    groups = F.pad(rows.float(), (0, -rows.shape[-1] % 32)).unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    rounded: torch.Tensor = (groups * (127 / largest)).round() * (largest / 127)
    return rounded.flatten(-2)[..., : rows.shape[-1]]


@needs_compiled
@pytest.mark.parametrize("outputs, inputs", [(48, 96), (33, 40)])
def test_quantised_products_are_those_of_the_rounded_weights_and_rows(outputs: int, inputs: int) -> None:
    weight, rows = numbers(outputs, inputs), numbers(5, inputs, seed=2)
    rows[2] *= 1e-20  # each row, and each 32 inputs of it, has a scale of its own
    rows[3, :32] = 0
    taken = rounded_by_32(rows)
    assert ((taken - rows).abs() <= rows.abs().amax(1, keepdim=True) / 253).all()
    whole, scale = int8_of(weight)
    torch.testing.assert_close(
        NativeProduct(weight, None, "int8")(rows), taken @ (whole * scale[:, None]).t(), atol=1e-4, rtol=1e-4
    )
    nibbles, scales = int4_of(weight)
    meant = nibbles * scales.repeat_interleave(32, 1)[:, :inputs]
    torch.testing.assert_close(NativeProduct(weight, None, "int4")(rows), taken @ meant.t(), atol=1e-4, rtol=1e-4)
    assert (whole * scale[:, None] - weight).abs().max() <= scale.max() / 2 + 1e-6
    assert (meant - weight).abs().max() <= scales.max() / 2 + 1e-6


def divergence_nats(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.exp() * (one - other)).sum(-1).mean())


@needs_compiled
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_model_computes_with_rounded_weights_and_rows_and_nothing_else_is_rounded(
    quantize: str, random_model: Path, record_property: Callable[[str, object], None]
) -> None:
    """On the small model of random weights, where nothing is redundant, INT8 costs 0.028 nats a token, INT4 2.8."""
    checkpoint = read_checkpoint(random_model)
    ids = torch.randint(0, checkpoint.vocab_size, (64,), generator=torch.Generator().manual_seed(5)).tolist()
    for end in (1, checkpoint.layers):
        whole, rounded = (LocalStage(checkpoint, 0, end, KERNELS["mesh-fp32"], threads=1) for _ in range(2))
        round_linear_layers(rounded, quantize)
        plain, meant = (stage.reference(ids, None).float() for stage in (whole, rounded))
        loaded = load_stage(checkpoint, 0, end, "float32", 1, quantize)
        assert loaded.stage.kernel.quantize == quantize and is_exact(loaded.numerics)
        at = range(64) if end == checkpoint.layers else ()
        found = loaded.stage.forward(0, end, [Segment(0, 64, 0, loaded.stage.sequence())], range(64), ids=ids, logits_at=at)
        if end == 1:  # before a number beside the middle of two whole ones goes the other way, which changes a row for good
            apart = (found - meant).norm(dim=1) / meant.norm(dim=1)
            assert apart.median() < 1e-5 < (plain - meant).norm(dim=1).min() / meant.norm(dim=1).max()
    plain, meant, found = (logits.log_softmax(-1) for logits in (plain, meant, found))
    cost_nats = divergence_nats(plain, found)
    assert divergence_nats(meant, found) < cost_nats / 5
    record_property("divergence_nats", cost_nats)
    assert 1e-4 < cost_nats < {"int8": 0.04, "int4": 4.0}[quantize]


def round_linear_layers(stage: LocalStage, quantize: str) -> None:
    for parent, name, layer in list(linear_modules(stage.model)):
        assert isinstance(layer.weight, torch.Tensor)
        numbers, scale = int8_of(layer.weight) if quantize == "int8" else int4_of(layer.weight)
        if quantize == "int4":
            scale = scale.repeat_interleave(32, 1)[:, : numbers.shape[1]]
        linear = getattr(parent, name)
        linear.weight.data = numbers * scale.view(len(numbers), -1)
        linear.register_forward_pre_hook(lambda layer, given: (rounded_by_32(given[0]),))


@needs_compiled
def test_quantised_weights_have_numerics_of_their_own(random_model: Path) -> None:
    checkpoint = read_checkpoint(random_model)
    numerics = {
        machine.fingerprint(checkpoint.weights, KERNELS[name], 1) for name in ("mesh-fp32", "mesh-int8-fp32", "mesh-int4-fp32")
    }
    assert len(numerics) == 3


def test_without_the_compiled_kernel_a_span_is_served_by_the_next_best(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "native", lambda: None)
    monkeypatch.setattr(machine, "refusal", lambda kernel: "no C compiler" if kernel.compiled else refusal(kernel))
    kernel_choice.choose.cache_clear()
    assert load_stage(read_checkpoint(random_model), 0, 2, "auto", 1).stage.kernel.name == FLOAT32
    assert [kernel.name for kernel in machine.candidates("auto", torch.bfloat16, "int8")] == ["aten-int8"]
    with pytest.raises(ValueError, match="this machine cannot compute with mesh-int4-fp32: no C compiler"):
        machine.candidates("auto", torch.float32, "int4")
    kernel_choice.choose.cache_clear()


class FakeCompiler:
    """Writes a library of its own making; counts."""

    def __init__(self) -> None:
        self.runs = 0
        self.complaint = ""

    def __call__(self, compiler: tuple[str, ...], library: Path) -> str:
        self.runs += 1
        library.write_bytes(b"a library")
        return self.complaint


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(build, "compilers", lambda: [("/usr/bin/cc",)])
    done = subprocess.CompletedProcess([], 0, stdout=b"a compiler 1.0")
    monkeypatch.setattr("subprocess.run", lambda *words, **more: done)
    monkeypatch.setattr(build, "compile_library", fake)
    return fake


def test_a_library_is_built_once_and_again_when_its_bytes_are_not_what_was_built(tmp_path: Path, compiler: FakeCompiler) -> None:
    library = built(tmp_path)
    assert built(tmp_path) == library and compiler.runs == 1
    library.write_bytes(b"another library")
    assert built(tmp_path).read_bytes() == b"a library" and compiler.runs == 2


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, compiler: FakeCompiler) -> None:
    compiler.complaint = "no such thing"
    with pytest.raises(CannotBuild, match="no such thing"):
        built(tmp_path)


def test_a_directory_that_others_may_write_to_is_not_trusted(tmp_path: Path, compiler: FakeCompiler) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with pytest.raises(CannotBuild, match="others may write"):
        built(tmp_path)
    assert compiler.runs == 0


@needs_compiled
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_weight_packed_in_pieces_is_that_packed_as_a_whole(
    stored: torch.dtype, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, up = torch.randn(2, 150, 70, generator=torch.Generator().manual_seed(3)).to(stored)
    weight = Interleaved([gate, up])
    turns = torch.zeros(10, 2, 16, 70, dtype=stored)
    for side, part in enumerate((gate, up)):
        turns[:, side] = torch.cat((part, part.new_zeros(10, 70))).view(10, 16, 70)
    whole = NativeProduct(turns.flatten(0, 2), None, quantize)
    rows = torch.randn(3, 70, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(product, "PIECE_ELEMENTS", 1)
    for cut in (weight, turns.flatten(0, 2)):
        assert len(list(product._pieces(cut))) == 3
        pieced = NativeProduct(cut, None, quantize)
        assert pieced.kind is whole.kind and torch.equal(pieced._packed, whole._packed)
        assert torch.equal(pieced(rows), whole(rows))
