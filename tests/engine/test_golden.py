"""One fingerprint on every machine: golden vectors on all instructions, and what a machine does that finds others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mesh.view import is_exact
from node.engine.kernels import golden, machine
from node.engine.loading import load_stage
from node.engine.model.attention import Segment
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.native.library import Isa, NativeLibrary, native
from node.engine.sampling import sampler
from tests.engine.offered import needs_compiled


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    found = native()
    assert found is not None
    yield found
    found.use(found.isa)


@needs_compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_golden_vectors_are_the_same_on_all_instructions_and_with_any_threads(threads: int, library: NativeLibrary) -> None:
    for isa in Isa:
        if Isa.NONE < isa <= library.isa:
            library.use(isa)
            assert golden.digest(library, threads) == golden.GOLDEN, isa


@needs_compiled
def test_golden_vectors_see_a_change_of_any_part(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden._model(torch.bfloat16, "none")
    logits = golden._logits(library, model, torch.float32, 1)
    assert logits.isfinite().all() and logits.std(1).min() > 0.1 and len(set(logits.argmax(1).tolist())) > 2
    model.layers[1].window = 0
    assert not torch.equal(golden._logits(library, model, torch.float32, 1), logits), "the window matters"
    monkeypatch.setattr(sampler, "uniforms", lambda *given, found=sampler.uniforms: found(*given) * 0.999)
    assert golden.digest(library) != golden.GOLDEN


@needs_compiled
@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spans_that_are_compiled_have_one_fingerprint_whatever_threads_and_instructions_compute_them(
    dtype: str, quantize: str, random_model: Path, library: NativeLibrary
) -> None:
    checkpoint = read_checkpoint(random_model)
    numerics, said = set(), []
    ids = torch.randint(0, 500, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for isa, threads in ((library.isa, 1), (library.isa, 2), (Isa.AVX2, 1)):
        library.use(isa)
        torch.set_num_threads(threads)
        try:
            loaded = load_stage(checkpoint, 0, 6, dtype, threads, quantize)
            numerics.add(loaded.numerics)
            segment = Segment(0, 40, 0, loaded.stage.sequence())
            said.append(loaded.stage.forward(0, 6, [segment], range(40), ids=ids, logits_at=[38, 39]).clone())
        finally:
            torch.set_num_threads(1)
    numerics.add(load_stage(checkpoint, 2, 5, dtype, 1, quantize).numerics)  # another span of the same model
    assert len(numerics) == 1 and is_exact(numerics.pop())
    assert all(torch.equal(each, said[0]) for each in said)


def test_what_decides_bits_is_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(weights: str = "w", name: str = "mesh-fp32", threads: int = 1, constants: str = "c") -> str:
        return machine.fingerprint(weights, KERNELS[name], threads, constants_digest=constants)

    monkeypatch.setattr(golden, "holds", lambda: True)
    alike = {fingerprint(), fingerprint(threads=2)}
    assert len(alike) == 1
    others = {
        fingerprint(weights="v"),
        fingerprint(name="mesh-bf16"),
        fingerprint(name="mesh-int8-fp32"),
        fingerprint(constants="other constants"),
        fingerprint(constants=""),  # not compiled as a whole
    }
    assert len(others | alike) == 6
    monkeypatch.setattr(machine, "cpu", lambda: "another kind of CPU")
    assert fingerprint() in alike and fingerprint(constants="") not in others
    monkeypatch.setattr(golden, "holds", lambda: False)
    assert fingerprint() not in others | alike and fingerprint() != fingerprint(threads=2)


@needs_compiled
def test_a_machine_that_finds_other_vectors_is_exact_with_its_own_kind_alone(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = read_checkpoint(random_model)
    elsewhere = load_stage(checkpoint, 0, 2, "float32", 1).numerics
    monkeypatch.setattr(golden, "GOLDEN", "what other machines find")
    golden.holds.cache_clear()
    try:
        assert not golden.holds()
        here = load_stage(checkpoint, 0, 2, "float32", 1).numerics
        assert is_exact(here) and here != elsewhere
    finally:
        monkeypatch.undo()
        golden.holds.cache_clear()


@needs_compiled
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_derived_from_a_config_is_the_same_in_every_span(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(checkpoint_of(name))
    assert len({load_stage(checkpoint, start, end, "float32", 1).numerics for start, end in ((0, 4), (0, 1), (2, 4))}) == 1
