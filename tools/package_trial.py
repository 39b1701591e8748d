"""Builds sdist and wheel, installs the wheel into a clean environment, and tries it there: `make package` runs this file.

The wheel is built from the sdist, so what the sdist lacks, the wheel lacks. The clean environment has the project from the wheel
alone; dependencies are those of the environment that runs this file, found through a path file, so nothing is downloaded and
nothing is copied. Path files are not followed a second time: the checkout, which is installed there as editable, stays out.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import httpx

from cli.local_mesh import ANNOUNCEMENT

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
WITHOUT_CHECKOUT = ("env", "-u", "PYTHONPATH", "-u", "PYTHONHOME")  # runs a command that finds installed packages alone
PACKAGES = ("cli", "membership", "mesh", "node", "rag", "routing")
START_S, READY_S, STOP_S = 120.0, 60.0, 30.0
CHAT = {"model": "mesh-demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}

# Run by the clean environment's Python: each package, and each kind of file that is not Python, is found beside the code.
PROBE = """
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import mesh
from node.engine import default_model
from node.engine.native import build
from node.http import dashboard

clean = Path(sys.prefix).resolve()
packages = [import_module(name) for name in sys.argv[1:]]
folders = [Path(package.__path__[0]).resolve() for package in packages]
assert all(clean in folder.parents for folder in folders), folders
assert all((folder / "py.typed").is_file() for folder in folders), folders
assert mesh.Client.__module__.startswith("mesh."), mesh.Client
sources = [build.SOURCES / part.source for part in build.PARTS] + [build.SOURCES / "entry.c"]
assert all(source.is_file() for source in sources), sources
assert all((default_model.DIRECTORY / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))
assert "/mesh/status" in dashboard.page()
print(version("gossip-mesh"))
"""


class TrialFailed(Exception):
    """What the packages were expected to have or do, and what came."""


def wrong_content(wheel: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """What the wheel lacks of the tracked files of the packages, and what it has beside them and its own metadata."""
    wanted = {name for name in tracked if name.partition("/")[0] in PACKAGES}
    content = {name for name in wheel if not name.partition("/")[0].endswith(".dist-info")}
    missing = [f"{name} is not in the wheel" for name in sorted(wanted - content)]
    return missing + [f"{name} is in the wheel, and should not be" for name in sorted(content - wanted)]


def run(command: Sequence[str | Path], folder: Path) -> str:
    """What a command prints. Raises TrialFailed when it fails."""
    words = [*WITHOUT_CHECKOUT, *(str(word) for word in command)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrialFailed(
            f"{' '.join(words[len(WITHOUT_CHECKOUT) :][:4])} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist of the checkout, and the wheel of the sdist."""
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder], ROOT)
    [sdist] = folder.glob("*.tar.gz")
    run([*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, sdist], folder)
    [wheel] = folder.glob("*.whl")
    return sdist, wheel


def require_content(wheel: Path) -> None:
    """Raises TrialFailed: the wheel is not the tracked files of the packages."""
    tracked = run(["git", "ls-files", "-z"], ROOT).split("\0")
    with zipfile.ZipFile(wheel) as archive:
        wrong = wrong_content(archive.namelist(), [name for name in tracked if (ROOT / name).is_file()])
    if wrong:
        raise TrialFailed("\n".join(wrong))


def install(wheel: Path, folder: Path) -> Path:
    """A clean environment with the wheel; its folder of programs."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    programs = folder / "bin"
    run([*PIP, "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index", wheel], folder.parent)
    [packages] = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return programs


def try_node(programs: Path, folder: Path) -> str:
    """Starts a node, asks it once, and stops it; what it answered. Raises TrialFailed."""
    command = [
        *WITHOUT_CHECKOUT,
        str(programs / "mesh"),
        "up",
        "--bind",
        "127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--data-dir",
        str(folder / "data"),
    ]
    with (folder / "node.log").open("w") as log:
        node = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert node.stdout is not None
        http = _announced(node.stdout)
        answer = _answer(http)
        node.send_signal(signal.SIGTERM)
        code = node.wait(STOP_S)
        if code:
            raise TrialFailed(f"expected exit code 0 after SIGTERM, got {code}")
        return answer
    except (TrialFailed, httpx.HTTPError, subprocess.TimeoutExpired) as error:
        raise TrialFailed(f"{error}\nthe node's log:\n{(folder / 'node.log').read_text()}") from error
    finally:
        node.kill()
        node.wait()


def _announced(stdout: IO[str]) -> str:
    """The HTTP address that the node prints. Raises TrialFailed: it ended, or printed nothing in time."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
    try:
        line = lines.get(timeout=START_S)
    except queue.Empty:
        raise TrialFailed(f"the node did not announce itself within {START_S:.0f} s") from None
    match = ANNOUNCEMENT.fullmatch(line.strip())
    if match is None:
        raise TrialFailed(f"expected the node's announcement, got {line!r}")
    return str(match["http"]).rstrip("/")


def _answer(http: str) -> str:
    """A chat answer, once the node is ready. Raises TrialFailed."""
    deadline = time.monotonic() + READY_S
    while httpx.get(f"{http}/ready", timeout=30).status_code != 200:
        if time.monotonic() > deadline:
            raise TrialFailed(f"the node is not ready after {READY_S:.0f} s")
        time.sleep(0.05)
    response = httpx.post(f"{http}/v1/chat/completions", json=CHAT, timeout=60)
    if response.status_code != 200:
        raise TrialFailed(f"expected a chat answer, got {response.status_code}: {response.text}")
    return json.dumps(response.json()["choices"][0]["message"]["content"])


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="mesh-package-") as name:
        folder = Path(name)
        try:
            sdist, wheel = build(folder)
            print(f"package: {wheel.name} of {wheel.stat().st_size >> 10} KiB, built from {sdist.name}")
            require_content(wheel)
            programs = install(wheel, folder / "clean")
            found = run([programs / "python", "-c", PROBE, *PACKAGES], folder).strip()
            print(f"package: version {found} imports in a clean environment, with its types, kernels, model and dashboard")
            if "up" not in run([programs / "mesh", "--help"], folder).split():
                raise TrialFailed("`mesh --help` lists no command `up`")
            print(f"package: a node answered {try_node(programs, folder)} and ended at SIGTERM with exit code 0")
        except TrialFailed as error:
            print(f"package: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
