"""Builds the compiled kernel with the machine's own C compiler, once a user and version of the sources.

What was built is kept under a name made of all that went into it, beside a digest of its bytes, in a directory that only
the user can write; a file that does not match is built anew. Several nodes that start together build once: the others
wait for the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")
TIME_LIMIT_S = 120.0
COMMON = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
WITH_AMX = "-DWITH_AMX"
PARTS = {  # object: its source and flags
    "rows_avx2": ("rows.c", ("-mavx2", "-mfma", "-mf16c")),
    "rows_avx512": ("rows.c", AVX512),
    "amx": ("amx.c", ("-mavx512f", "-mfma", "-mamx-tile", "-mamx-bf16")),
    "entry": ("entry.c", (WITH_AMX,)),
    "pool": ("pool.c", ()),
}


class CannotBuild(Exception):
    """Why there is no compiled kernel on this machine."""


def built(cache_dir: Path) -> Path:
    """The shared library, built first if need be: some seconds.

    Raises:
        CannotBuild: another processor, no compiler, or one that does not do.
    """
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise CannotBuild(f"it is written for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    compiler = next((found for found in map(shutil.which, COMPILERS) if found), None)
    if compiler is None:
        raise CannotBuild(f"no C compiler: looked for {', '.join(COMPILERS)}")
    try:
        directory = _own_directory(cache_dir / "kernels")
        library = directory / f"mesh-{_recipe(compiler)}.so"
        if not _is_whole(library):
            with _locked(directory):
                if not _is_whole(library):
                    _build(compiler, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{type(error).__name__}: {error}"[:300]) from error
    return library


def _own_directory(directory: Path) -> Path:
    """Raises CannotBuild: others could put a library of theirs there."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise CannotBuild(f"others may write to {directory}; make it yours alone (chmod 700)")
    return directory


def _recipe(compiler: str) -> str:
    """Names sources, flags and compiler."""
    digest = hashlib.blake2b(repr((COMMON, PARTS)).encode(), digest_size=8)
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    said = subprocess.run([compiler, "--version"], capture_output=True, timeout=TIME_LIMIT_S, check=False)
    digest.update(compiler.encode() + said.stdout)
    return digest.hexdigest()


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".digest")


def _digest(library: Path) -> str:
    return hashlib.blake2b(library.read_bytes(), digest_size=16).hexdigest()


def _is_whole(library: Path) -> bool:
    try:
        return _digest_file(library).read_text() == _digest(library)
    except FileNotFoundError:
        return False


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        aside = Path(folder) / "mesh.so"
        said = _compile(compiler, aside, with_amx=True)
        if said:  # a compiler from before AMX
            said = _compile(compiler, aside, with_amx=False)
        if said:
            raise CannotBuild(f"{compiler} failed: {said[:300]}")
        _digest_file(library).write_text(_digest(aside))
        os.rename(aside, library)


def _compile(compiler: str, library: Path, with_amx: bool) -> str:
    """Compiles all parts beside one another and links them; gives what the compiler complained of, if it failed."""
    running = []
    for name, (source, flags) in PARTS.items():
        if name == "amx" and not with_amx:
            continue
        some = [flag for flag in flags if with_amx or flag != WITH_AMX]
        target = library.with_name(f"{name}.o")
        command = [compiler, *COMMON, *some, "-c", str(SOURCES / source), "-o", str(target)]
        running.append((target, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)))
    complaints = []
    for _, child in running:
        with child:
            _, said = child.communicate(timeout=TIME_LIMIT_S)
        if child.returncode:
            complaints.append(said.strip())
    if complaints:
        return complaints[0]
    link = [compiler, "-shared", "-pthread", *(str(target) for target, _ in running), "-o", str(library)]
    linked = subprocess.run(link, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
    return linked.stderr.strip() or "the linker failed" if linked.returncode else ""
