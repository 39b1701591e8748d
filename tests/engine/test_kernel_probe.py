"""A machine is asked which kernels it has, and what it lacks is neither chosen nor loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh.errors import BadRequest
from node.config import NodeConfig
from node.engine import loading
from node.engine.kernels import kernel_choice, machine
from node.engine.kernels.kernel_probe import refusal
from node.engine.loading import load_stage
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS, Kernel, Rows
from node.engine.model.local_stage import LocalStage
from node.engine.native import library
from node.engine.native.build import CannotBuild
from node.engine.native.library import Isa, absence, native
from node.host.environment import CPU_ISA_VARIABLE, cpu_isa
from tests.engine.offered import needs_compiled

ONEDNN = "mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx512bw"


def raising(error: Exception) -> Callable[[Any, Any], Rows]:
    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Rows:
        raise error

    return pack


def scaled(factor: float) -> Callable[[Any, Any], Rows]:
    return lambda weight, bias: lambda rows: rows @ weight.t() * factor


def test_plain_torch_computes_on_every_machine_and_no_kernel_is_asked_in_vain() -> None:
    assert {name for name, kernel in KERNELS.items() if not refusal(kernel)} >= {"aten-fp32", "aten-bf16"}


@pytest.mark.parametrize(
    ("pack", "reason"),
    [
        (raising(RuntimeError(ONEDNN + "\n  raised in C++")), ONEDNN + " raised in C++"),
        (raising(NotImplementedError()), "NotImplementedError"),
        (raising(AttributeError("'_OpNamespace' 'mkldnn' object has no attribute 'x'")), "'_OpNamespace' 'mkldnn' object"),
        (scaled(1.01), "its product of a small matrix is wrong"),
        (scaled(float("nan")), "its product of a small matrix is wrong"),
        (lambda weight, bias: lambda rows: rows, "its product of a small matrix is wrong"),
        (scaled(1.0), ""),
    ],
)
def test_a_kernel_that_is_refused_or_computes_wrongly_is_told_with_the_reason(pack: Any, reason: str) -> None:
    said = refusal(Kernel("tried", torch.float32, pack))
    assert said.startswith(reason) and bool(said) is bool(reason)


def test_an_error_of_our_own_is_not_taken_for_a_refusal() -> None:
    with pytest.raises(TypeError):
        refusal(Kernel("tried", torch.float32, raising(TypeError("pack() takes 1 argument"))))


@pytest.fixture
def no_onednn_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(machine, "refusal", lambda kernel: ONEDNN if kernel.name == "onednn-bf16" else refusal(kernel))
    kernel_choice.choose.cache_clear()
    yield
    kernel_choice.choose.cache_clear()


@pytest.mark.usefixtures("no_onednn_bf16")
def test_a_kernel_that_the_machine_lacks_is_no_candidate_and_costs_no_load(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    class Watched(LocalStage):
        def __init__(self, *given: Any) -> None:
            built.append(given[3].name)
            super().__init__(*given)

    monkeypatch.setattr(loading, "LocalStage", Watched)
    load_stage(read_checkpoint(checkpoint_of("llama")), 0, 2, "bfloat16", threads=1)
    assert built and "onednn-bf16" not in built and built[0] in ("mesh-bf16", "aten-bf16")


@pytest.mark.usefixtures("no_onednn_bf16")
def test_a_kernel_that_is_named_and_not_there_is_refused_with_the_reason(
    checkpoint_of: Callable[[str], Path],
) -> None:
    with pytest.raises(BadRequest, match="this machine cannot compute with onednn-bf16: mkldnn_reorder"):
        load_stage(read_checkpoint(checkpoint_of("llama")), 0, 2, "onednn-bf16", threads=1)


def test_the_extensions_of_avx512_do_not_count_where_torch_is_held_to_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert machine.isa.__wrapped__() == "AVX512+bf16+vnni+amx"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine.isa.__wrapped__() == "AVX2"


# ---- MESH_CPU_ISA


def test_the_instructions_of_the_compiled_kernel_may_be_bounded_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in (("", "amx"), ("avx2", "avx2"), ("none", "none")):
        monkeypatch.setenv(CPU_ISA_VARIABLE, said)
        assert cpu_isa() == expected
    monkeypatch.setenv(CPU_ISA_VARIABLE, "sse")
    with pytest.raises(BadRequest, match="MESH_CPU_ISA: expected none, avx2, avx512 or amx, got 'sse'"):
        NodeConfig()


def test_without_the_compiled_kernel_by_choice_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_ISA_VARIABLE, "none")
    monkeypatch.setattr(library, "built", lambda cache_dir: pytest.fail("it was built"))
    assert library._opened.__wrapped__() == (None, "MESH_CPU_ISA is none")


def test_why_there_is_no_compiled_kernel_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CPU_ISA_VARIABLE, raising=False)

    def fail(cache_dir: Path) -> Path:
        raise CannotBuild("no C compiler:\nlooked for cc")

    monkeypatch.setattr(library, "built", fail)
    assert library._opened.__wrapped__() == (None, "no C compiler: looked for cc")


@needs_compiled
def test_the_compiled_kernel_keeps_to_the_instructions_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    open_library = native()
    assert open_library is not None and absence() == ""
    try:
        monkeypatch.setenv(CPU_ISA_VARIABLE, "avx2")
        capped, _ = library._opened.__wrapped__()
        assert capped is not None and capped.isa is Isa.AVX2
    finally:
        open_library.use(open_library.isa)  # both are one library to the loader
