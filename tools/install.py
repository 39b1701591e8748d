"""Makes the virtual environment and installs the project into it, with the build of torch that suits the machine.

`python3 tools/install.py --venv .venv --torch auto --cpu-index URL`, as `make install` runs it; it needs nothing but Python.

PyPI's torch for Linux comes with CUDA, 2.7 GB of it, which is of no use without an NVIDIA device. So where there is none torch
alone is taken from the index of CPU builds first; then pip finds it installed. `--torch`:

- `auto`: so, unless pip's configuration names sources of its own (an index, a folder): then all comes from those.
- `cpu`: the CPU build from `--cpu-index`, whatever the machine has and pip is configured for.
- `default`: what pip finds by itself.

An index that cannot be reached costs a message: pip goes on with what it finds by itself. The version is that of constraints.txt.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
CHOICES = ("auto", "cpu", "default")
SOURCE_SETTINGS = ("index-url", "extra-index-url", "find-links", "no-index")
SECTIONS = (":env:", "global", "install")  # of pip's configuration, those that `pip install` reads
NVIDIA_VENDOR, DISPLAY_CLASS = "0x10de", "0x03"
SIZES = {"cpu": "about 0.2 GB to download", "cuda": "about 2.7 GB to download"}
INSTALLED_TORCH = "import importlib.metadata as found; print(found.version('torch'))"
# Compiled when they are imported, if ever: a third of the sources, of which a node imports a few.
LEFT_UNCOMPILED = r"site-packages/(transformers/models|(.*/)?tests?)/"
INDEX_PATIENCE = ("--retries", "1", "--timeout", "15")


@dataclass(frozen=True)
class TorchChoice:
    """Whether torch is taken from the index of CPU builds first, and why, for a person to read."""

    from_cpu_index: bool
    reason: str


def nvidia_device(root: Path = Path("/")) -> str:
    """What shows that there is an NVIDIA device, driver or not; empty where nothing does."""
    for sign in ("dev/nvidia0", "proc/driver/nvidia/version", "usr/lib/wsl/lib/nvidia-smi"):
        if (root / sign).exists():
            return f"/{sign}"
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        if _word(device / "vendor") == NVIDIA_VENDOR and _word(device / "class").startswith(DISPLAY_CLASS):
            return f"PCI device {device.name}"
    return ""


def _word(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def configured_sources(listed: Iterable[str]) -> list[str]:
    """The settings in the output of `pip config list` that say where packages come from; their values are not shown."""
    names = [line.partition("=")[0].strip() for line in listed]
    parts = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in names]
    return sorted({setting for section, setting in parts if section in SECTIONS and setting in SOURCE_SETTINGS})


def torch_choice(wanted: str, installed: str, system: str, nvidia: str, sources: list[str]) -> TorchChoice:
    """`installed`: torch's version in the environment, if any; `nvidia`, `sources`: as found."""
    if installed:
        return TorchChoice(False, f"torch {installed} is installed already (`make clean` first to choose anew)")
    if wanted == "cpu":
        return TorchChoice(True, f"the CPU build of torch, as asked for: {SIZES['cpu']}")
    if wanted == "default":
        return TorchChoice(False, "torch as pip finds it, as asked for")
    if sources:
        where = f"torch from where pip is configured to look ({', '.join(sources)})"
        return TorchChoice(False, f"{where}; if that has PyPI's build with CUDA, make MESH_TORCH=cpu spares 2.5 GB")
    if system != "Linux":
        return TorchChoice(False, f"torch as pip finds it: on {system} that is the build for CPUs")
    if nvidia:
        return TorchChoice(False, f"torch with CUDA, for there is an NVIDIA device ({nvidia}): {SIZES['cuda']}")
    return TorchChoice(True, f"the CPU build of torch, for there is no NVIDIA device: {SIZES['cpu']}")


def pinned_torch(constraints: Path) -> str:
    """The requirement that constraints.txt holds torch to."""
    return next(line.strip() for line in constraints.read_text().splitlines() if line.startswith("torch=="))


def say(message: str) -> None:
    print(f"install: {message}", flush=True)


def output(python: Path, *words: str) -> str | None:
    """What the environment's Python prints; None where it fails."""
    try:
        done = subprocess.run([str(python), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout


def pip(python: Path, *words: str) -> int:
    """Runs pip with its own progress shown; its exit code."""
    return subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", *words], check=False).returncode


def install(venv: Path, wanted: str, cpu_index: str, extras: str) -> int:
    """Makes the environment and fills it; the exit code."""
    if sys.version_info < OLDEST_PYTHON:
        say(f"Python 3.11 or newer is needed, this is {platform.python_version()}; name another: make PYTHON=python3.12")
        return 1
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False)
    configuration = output(python, "-m", "pip", "config", "list")
    if configuration is None:
        say(f"there is no pip in {venv}: {sys.executable} could not make it")
        say("on Debian and Ubuntu: apt-get install python3-venv, then make clean install")
        return 1
    installed = (output(python, "-c", INSTALLED_TORCH) or "").strip()
    choice = torch_choice(wanted, installed, platform.system(), nvidia_device(), configured_sources(configuration.splitlines()))
    say(f"{choice.reason}; the other packages, about 0.3 GB, from where pip looks; 1.7 GB on disk with the CPU build. Once only")
    constraints = ROOT / "constraints.txt"
    if choice.from_cpu_index:
        requirement = pinned_torch(constraints)
        failed = pip(python, "install", *INDEX_PATIENCE, "--no-compile", "--no-deps", "--index-url", cpu_index, requirement)
        if failed:
            say(f"there is no {requirement} at {cpu_index}, or it cannot be reached: going on with what pip finds by itself,")
            say(f"which on Linux comes with CUDA: {SIZES['cuda']}. To name another index: make TORCH_CPU_INDEX=URL")
    code = pip(python, "install", "--no-compile", "-c", str(constraints), "-e", f"{ROOT}[{extras}]")
    if code == 0:
        compile_packages(python, venv / "lib")
    return code


def compile_packages(python: Path, folder: Path) -> None:
    """Compiles what is installed, on all cores: pip would do it on one, and that was half of what an installation takes.

    A file that does not compile, such as an example for a newer Python, fails when it is imported, as after pip.
    """
    words = ["-m", "compileall", "-qq", "-j", "0", "-x", LEFT_UNCOMPILED, str(folder)]
    subprocess.run([str(python), *words], check=False)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", choices=CHOICES, default="auto", help="which build of torch")
    parser.add_argument("--cpu-index", required=True, help="an index that has CPU builds of torch")
    parser.add_argument("--extras", default="dev", help="of pyproject.toml, separated by commas")
    given = parser.parse_args(words)
    return install(given.venv, given.torch, given.cpu_index, given.extras)


if __name__ == "__main__":
    raise SystemExit(main())
