"""Which compiler builds the compiled kernel: the machine's own, else that of the package ziglang; with the same bits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from node.engine.native import build, product
from node.engine.native.build import CannotBuild, Compiler, built, compile_library, compilers
from node.engine.native.library import NativeLibrary
from node.engine.native.product import NativeProduct
from node.host.uncompiled import remedy
from tests.engine.offered import needs_compiled

PACKAGE = (sys.executable, "-m", "ziglang", "cc")
PATHS = {"cc": "/usr/bin/cc", "gcc": "/usr/bin/gcc", "clang": "/opt/clang"}

needs_package = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="the package ziglang is not installed")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Imitates a machine with these compilers on the PATH, the package or not; `links`: what is a link to what."""

    def imitate(*names: str, package: bool = False, links: dict[str, str] | None = None) -> None:
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr("platform.system", lambda: "Linux")
        monkeypatch.setattr("shutil.which", lambda name: PATHS[name] if name in names else None)
        monkeypatch.setattr("os.path.realpath", lambda path: (links or {}).get(path, path))
        monkeypatch.setattr(build, "find_spec", lambda name: object() if package and name == "ziglang" else None)

    return imitate


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[Compiler, str]:
    """Compilers that are run, each with its error, which is empty at first: then it writes a library."""
    complaints: dict[Compiler, str] = {}

    def fake(compiler: Compiler, library: Path) -> str:
        library.write_bytes(repr(compiler).encode())
        return complaints.setdefault(compiler, "")

    done = subprocess.CompletedProcess([], 0, stdout=b"a compiler 1.0")
    monkeypatch.setattr("subprocess.run", lambda *words, **more: done)
    monkeypatch.setattr(build, "compile_library", fake)
    return complaints


def test_the_machines_own_compilers_come_before_the_packages(machine: Callable[..., None]) -> None:
    machine("gcc", "clang", package=True)
    assert compilers() == [("/usr/bin/gcc",), ("/opt/clang",), PACKAGE]
    machine("cc", "gcc", links={"/usr/bin/cc": "/usr/bin/gcc-12", "/usr/bin/gcc": "/usr/bin/gcc-12"})
    assert compilers() == [("/usr/bin/cc",)], "two names of one compiler"
    machine()
    assert compilers() == []


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine()
    with pytest.raises(CannotBuild, match="no C compiler: looked for cc, gcc, clang and the package ziglang") as refusal:
        built(tmp_path)
    assert "apt-get install gcc" in remedy(str(refusal.value)) and "pip install ziglang" in remedy(str(refusal.value))


def test_the_package_builds_where_there_is_no_other_compiler(
    tmp_path: Path, machine: Callable[..., None], tried: dict[Compiler, str]
) -> None:
    machine(package=True)
    library = built(tmp_path)
    assert library.read_bytes() == repr(PACKAGE).encode() and built(tmp_path) == library
    assert list(tried) == [PACKAGE]


def test_a_compiler_that_fails_gives_way_to_the_next(
    tmp_path: Path, machine: Callable[..., None], tried: dict[Compiler, str]
) -> None:
    machine("cc", package=True)
    tried[("/usr/bin/cc",)] = "fatal error: stdio.h: No such file"
    assert built(tmp_path).read_bytes() == repr(PACKAGE).encode()
    tried[PACKAGE] = "no room"
    with pytest.raises(CannotBuild) as refusal:
        built(tmp_path / "elsewhere")
    said = str(refusal.value)
    assert said == "the C compiler failed: cc: fatal error: stdio.h: No such file; ziglang cc: no room"
    assert "libc6-dev" in remedy(said)
    assert "/usr" not in said, "no path of the machine, for the reason goes to peers"


def test_what_the_packages_compiler_keeps_for_itself_goes_with_the_folder_it_builds_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []

    class Started:
        returncode = 1

        def __init__(self, *words: Any, env: dict[str, str], **more: Any) -> None:
            environments.append(env)

        def __enter__(self) -> Started:
            return self

        def __exit__(self, *error: Any) -> None: ...

        def communicate(self, timeout: float) -> tuple[None, str]:
            return None, "no"

    monkeypatch.setattr("subprocess.Popen", Started)
    assert compile_library(PACKAGE, tmp_path / "mesh.so") == "no"
    for environment in environments:
        assert environment["ZIG_GLOBAL_CACHE_DIR"] == environment["ZIG_LOCAL_CACHE_DIR"] == str(tmp_path / "zig")
        assert environment["PATH"] == os.environ["PATH"]


@needs_package
@needs_compiled
@pytest.mark.timeout(600)  # it compiles its own C library first: half a minute of CPU time
def test_the_packages_compiler_gives_the_bits_of_the_machines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not (error := compile_library(PACKAGE, tmp_path / "mesh.so")), error
    theirs = NativeLibrary(tmp_path / "mesh.so")
    numbers = torch.Generator().manual_seed(3)
    weight, rows = torch.randn(100, 328, generator=numbers), torch.randn(70, 328, generator=numbers)
    for quantize in ("none", "int8", "int4"):
        for dtype in (torch.float32, torch.bfloat16):
            mine = NativeProduct(weight.to(dtype), None, quantize)(rows.to(dtype))
            with monkeypatch.context() as patched:
                patched.setattr(product, "native", lambda: theirs)
                other = NativeProduct(weight.to(dtype), None, quantize)(rows.to(dtype))
            assert torch.equal(mine, other)
