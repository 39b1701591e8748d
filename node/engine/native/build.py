"""Builds the compiled kernel with a C compiler, once for each user and version of the sources.

The machine's own compilers are tried first, in the order of COMPILERS, then that of the package `ziglang` where it is installed
in the same environment: it needs no root, and its code gives the same bits (docs/decisions/0031).

The library is kept under a name that is a digest of sources, flags and compiler, with a digest of its bytes in a second
file, in a directory that only the user can write; a library that does not match is built anew. Of several nodes that
start together one builds, while the others wait for the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import structlog

from node.host.environment import child_environment
from node.host.uncompiled import COMPILER_FAILED, NO_COMPILER

SOURCES = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")
PACKAGE = "ziglang"
TIME_LIMIT_S = 300.0  # for each call of a compiler: the first build of the package's is slow on a busy machine
COMMON = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")


@dataclass(frozen=True)
class ObjectFile:
    """One object file of the library. One with a `define` is optional, for older compilers lack its instructions."""

    name: str
    source: str
    flags: tuple[str, ...]
    define: str = ""


PARTS = (
    ObjectFile("rows_avx2", "rows.c", AVX2),
    ObjectFile("rows_avx512", "rows.c", AVX512),
    ObjectFile("dots_avx2", "dots.c", AVX2),
    ObjectFile("dots_avx_vnni", "dots.c", (*AVX2, "-mavxvnni"), "WITH_AVX_VNNI"),
    ObjectFile("dots_avx512_vnni", "dots.c", (*AVX512, "-mavx512vnni"), "WITH_AVX512_VNNI"),
    ObjectFile("amx", "amx.c", ("-mavx512f", "-mfma", "-mamx-tile", "-mamx-bf16"), "WITH_AMX"),
    ObjectFile("pool", "pool.c", ()),
)


Compiler = tuple[str, ...]
"""The first arguments of its command line."""

log = structlog.get_logger()


class CannotBuild(Exception):
    """The compiled kernel cannot be built on this machine; the message gives the reason."""


def compilers() -> list[Compiler]:
    """Returns the C compilers on this machine, in the order in which they are tried."""
    paths = [path for path in map(shutil.which, COMPILERS) if path]
    own = [(path,) for number, path in enumerate(paths) if os.path.realpath(path) not in map(os.path.realpath, paths[:number])]
    return [*own, *([(sys.executable, "-m", PACKAGE, "cc")] if find_spec(PACKAGE) else [])]


def built(cache_dir: Path) -> Path:
    """Returns the path of the shared library, which is built first if needed: some seconds.

    Raises:
        CannotBuild: another processor or system, no compiler, or none that works.
    """
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise CannotBuild(f"it is written for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    found = compilers()
    if not found:
        raise CannotBuild(f"{NO_COMPILER}: looked for {', '.join(COMPILERS)} and the package {PACKAGE}")
    try:
        directory = _private_directory(cache_dir / "kernels")
    except OSError as error:
        raise CannotBuild(f"{type(error).__name__}: {error}"[:300]) from error
    errors = []
    for compiler in found:
        try:
            return _built_by(compiler, directory)
        except (OSError, subprocess.TimeoutExpired, CannotBuild) as error:
            errors.append(f"{_compiler_name(compiler)}: {' '.join(str(error).split())[:200]}")
    raise CannotBuild(f"{COMPILER_FAILED}: {'; '.join(errors)}")


def _built_by(compiler: Compiler, directory: Path) -> Path:
    library = directory / f"mesh-{_inputs_digest(compiler)}.so"
    if not _is_intact(library):
        with _locked(directory):
            if not _is_intact(library):
                log.info(
                    "building the compiled kernel", compiler=_compiler_name(compiler), why="once for this version of its sources"
                )
                _build(compiler, library)
    return library


def _compiler_name(compiler: Compiler) -> str:
    """Returns the compiler's name for messages, without directories of this machine."""
    return compiler[0].rpartition("/")[2] if len(compiler) == 1 else " ".join(compiler[2:])


def _private_directory(directory: Path) -> Path:
    """Makes the directory if needed. Raises CannotBuild: other users may write to it."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise CannotBuild(f"others may write to {directory}; make it yours alone (chmod 700)")
    return directory


def sources_digest() -> str:
    """Returns a digest of the sources and their compiler flags."""
    digest = hashlib.blake2b(repr((COMMON, PARTS)).encode(), digest_size=8)
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _inputs_digest(compiler: Compiler) -> str:
    """Returns a digest of sources, flags and compiler."""
    digest = hashlib.blake2b(sources_digest().encode(), digest_size=8)
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=TIME_LIMIT_S, check=False)
    digest.update("\0".join(compiler).encode() + version.stdout)
    return digest.hexdigest()


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".digest")


def _digest(library: Path) -> str:
    return hashlib.blake2b(library.read_bytes(), digest_size=16).hexdigest()


def _is_intact(library: Path) -> bool:
    try:
        return _digest_file(library).read_text() == _digest(library)
    except FileNotFoundError:
        return False


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(compiler: Compiler, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built_aside = Path(folder) / "mesh.so"
        if error := compile_library(compiler, built_aside):
            raise CannotBuild(error)
        _digest_file(library).write_text(_digest(built_aside))
        os.rename(built_aside, library)


def compile_library(
    compiler: Compiler, library: Path, parts: tuple[ObjectFile, ...] = PARTS, entry_flags: tuple[str, ...] = ()
) -> str:
    """Compiles all parts in parallel, then entry.c, which chooses among them, and links; returns the error, or ""."""
    running = [(part, _start_compiler(compiler, part, library)) for part in parts]
    targets, defines, errors = [], [], []
    for part, (target, child) in running:
        with child:
            _, output = child.communicate(timeout=TIME_LIMIT_S)
        if not child.returncode:
            targets.append(target)
            defines += [f"-D{part.define}"] if part.define else []
        elif not part.define:
            errors.append(output.strip() or f"no object for {part.name}")
    if errors:
        return errors[0]
    target, child = _start_compiler(compiler, ObjectFile("entry", "entry.c", (*defines, *entry_flags)), library)
    with child:
        _, output = child.communicate(timeout=TIME_LIMIT_S)
    if child.returncode:
        return output.strip() or "no object for entry"
    link = [*compiler, "-shared", "-pthread", *map(str, [*targets, target]), "-o", str(library)]
    environment = _environment(library)
    linked = subprocess.run(link, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False, env=environment)
    return linked.stderr.strip() or "the linker failed" if linked.returncode else ""


def _environment(library: Path) -> dict[str, str]:
    """Returns an environment in which the package's compiler keeps its cache, 60 MB, in the temporary folder of the build."""
    cache = str(library.parent / "zig")
    return child_environment(ZIG_GLOBAL_CACHE_DIR=cache, ZIG_LOCAL_CACHE_DIR=cache)


def _start_compiler(compiler: Compiler, part: ObjectFile, library: Path) -> tuple[Path, subprocess.Popen[str]]:
    """Starts the compiler for one part; returns the object file, next to `library`, and the process."""
    target = library.with_name(f"{part.name}.o")
    command = [*compiler, *COMMON, *part.flags, "-c", str(SOURCES / part.source), "-o", str(target)]
    environment = _environment(library)
    return target, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
