"""Code for instructions that this CPU may lack, run all the same: tiles in plain C, AVX-VNNI's in AVX-512's encoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from node.engine.model import compiled_layers
from node.engine.model.attention import Segment
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.model.local_stage import LocalStage
from node.engine.native import build, product
from node.engine.native.build import AVX2, AVX512, PARTS, ObjectFile, compile_library, compilers
from node.engine.native.library import Isa, NativeLibrary, native
from node.engine.native.product import NativeProduct
from tests.engine.checkpoints import make_checkpoint
from tests.engine.offered import needs_compiled

pytestmark = needs_compiled
SOFT_AMX = Path(__file__).with_name("soft_amx.h")
REQUIRED = tuple(part for part in PARTS if not part.define)


def variant(directory: Path, parts: tuple[ObjectFile, ...], entry_flags: tuple[str, ...]) -> NativeLibrary:
    compiler = compilers()[0]
    complaint = compile_library(compiler, directory / "mesh.so", parts, entry_flags)
    assert not complaint, complaint
    return NativeLibrary(directory / "mesh.so")


@pytest.fixture(scope="module")
def imitated(tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
    """Tiles in plain C; where the CPU has AVX512_VNNI, the code for AVX-VNNI in its encoding."""
    soft = f'-DSOFT_AMX="{SOFT_AMX}"'
    parts = (*REQUIRED, ObjectFile("amx", "amx.c", (*AVX2, soft), "WITH_AMX"))
    flags = [soft]
    if torch.cpu._is_vnni_supported():
        parts = (*parts, ObjectFile("dots_avx_vnni", "dots.c", (*AVX512, "-mavx512vnni", "-DDOTS_256"), "WITH_AVX_VNNI"))
        flags += ["-DDOTS_256"]
    library = variant(tmp_path_factory.mktemp("imitated"), parts, tuple(flags))
    assert library.isa is Isa.AMX
    return library


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def built_library() -> Iterator[NativeLibrary]:
    found = native()
    assert found is not None
    found.use(Isa.AVX2)
    yield found
    found.use(found.isa)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("shape", [(100, 72), (33, 1100)], ids=str)
def test_imitated_products_have_the_bits_of_avx2(
    shape: tuple[int, int], quantize: str, built_library: NativeLibrary, imitated: NativeLibrary
) -> None:
    weight, bias = numbers(*shape).bfloat16(), numbers(shape[0], seed=2)
    one = NativeProduct(weight, bias, quantize)
    for dtype in (torch.bfloat16, torch.float32):
        rows = numbers(300, shape[1], seed=3).to(dtype)
        rows[7] *= 1e-25
        whole = one(rows)
        one._library = imitated
        try:
            for first, count in ((0, 1), (7, 2), (2, 3), (4, 4), (9, 5), (0, 16), (40, 17), (3, 33), (0, 257), (0, 300)):
                assert torch.equal(one(rows[first : first + count]), whole[first : first + count]), (dtype, count)
        finally:
            one._library = built_library


def test_layers_with_imitated_tiles_have_the_bits_of_avx2(
    imitated: NativeLibrary, built_library: NativeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over prompts of several blocks, in pieces, with few and with many rows; keys wider than one step of a panel."""
    checkpoint = read_checkpoint(make_checkpoint(tmp_path, "llama", num_hidden_layers=2, head_dim=80, num_key_value_heads=1))
    ids = torch.randint(0, 500, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    said = []
    for library in (built_library, imitated):
        monkeypatch.setattr(compiled_layers, "native", lambda library=library: library)
        monkeypatch.setattr(product, "native", lambda library=library: library)
        for quantize in ("none", "int8"):
            stage = LocalStage(checkpoint, 0, 2, KERNELS["mesh-bf16" if quantize == "none" else "mesh-int8"], threads=1)
            stage.pack()
            kv, at = stage.sequence(), 0
            for count in (290, 1, 1, 40, 3, 64, 1):
                some, positions = ids[at : at + count], range(at, at + count)
                out = stage.forward(0, 2, [Segment(0, count, at, kv)], positions, ids=some, logits_at=[count - 1])
                said.append(out.clone())
                at += count
    assert len(said) == 28 and not any(out.isnan().any() for out in said)
    for mine, soft in zip(said[:14], said[14:]):
        assert torch.equal(mine, soft)


def test_parts_that_an_older_compiler_does_not_know_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMMON", ("-O1", *build.COMMON[1:]))  # quicker
    unknown = tuple(
        ObjectFile(part.name, part.source, (*part.flags, "-mno-such-thing"), part.define) if part.define else part
        for part in PARTS
    )
    library = variant(tmp_path, unknown, ())
    assert Isa.AVX2 <= library.isa <= Isa.AVX512
    broken = (ObjectFile("pool", "pool.c", ("-mno-such-thing",)), *REQUIRED[:-1])
    (tmp_path / "broken").mkdir()
    compiler = compilers()[0]
    assert "no-such-thing" in compile_library(compiler, tmp_path / "broken" / "mesh.so", broken)
