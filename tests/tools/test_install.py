"""`make install`: which build of torch it takes, what it says before, and that no index is needed but pip's own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import install
from tools.install import TorchChoice, configured_sources, nvidia_device, pinned_torch, torch_choice

ROOT = Path(__file__).resolve().parents[2]
INDEX = "https://index.invalid/cpu"
FAKE_PYTHON = """#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >> said
case "$*" in
  "-m pip config list") cat config ;;
  "-c "*) test -s installed && cat installed ;;
  *"--index-url"*) exit "$(cat index_fails)" ;;
  *) exit "$(cat pip_fails)" ;;
esac
"""


class FakeVenv:
    """An environment whose Python notes what it is asked to do."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._bin = folder / "bin"
        self._bin.mkdir()
        python = self._bin / "python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
        self.set(config="", installed="", index_fails="0", pip_fails="0")

    def set(self, **files: str) -> None:
        for name, content in files.items():
            (self._bin / name).write_text(content)

    def compilations(self) -> list[list[str]]:
        """The words of each call of compileall."""
        said = (self._bin / "said").read_text().splitlines()
        return [line.split()[2:] for line in said if line.startswith("-m compileall")]

    def installs(self) -> list[list[str]]:
        """The words of each `pip install`."""
        said = (self._bin / "said").read_text().splitlines()
        return [line.split()[3:] for line in said if line.startswith("-m pip --disable-pip-version-check")]


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVenv:
    """On Linux, without an NVIDIA device."""
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(install, "nvidia_device", lambda: "")
    return FakeVenv(tmp_path)


def run(venv: FakeVenv, *words: str) -> int:
    return install.main(["--venv", str(venv.path), "--cpu-index", INDEX, *words])


EVERYTHING = ["install", "--no-compile", "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]"]
CPU_TORCH = ["install", *install.INDEX_PATIENCE, "--no-compile", "--no-deps", "--index-url", INDEX, "torch==2.13.0"]


def test_without_an_nvidia_device_torch_alone_comes_from_the_index_of_cpu_builds(
    venv: FakeVenv, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(venv) == 0
    assert venv.installs() == [CPU_TORCH, EVERYTHING]
    said = capfd.readouterr().out
    assert said.startswith("install: the CPU build of torch, for there is no NVIDIA device: about 0.2 GB to download; ")


def test_an_index_that_cannot_be_reached_costs_a_message_and_nothing_else(
    venv: FakeVenv, capfd: pytest.CaptureFixture[str]
) -> None:
    venv.set(index_fails="1")
    assert run(venv) == 0
    assert venv.installs() == [CPU_TORCH, EVERYTHING]
    said = capfd.readouterr().out
    assert f"there is no torch==2.13.0 at {INDEX}, or it cannot be reached" in said and "about 2.7 GB" in said


@pytest.mark.parametrize("setting", ["index-url", "extra-index-url", "find-links", "no-index"])
@pytest.mark.parametrize("section", [":env:", "global", "install"])
def test_where_pip_is_configured_with_sources_all_comes_from_those(
    section: str, setting: str, venv: FakeVenv, capfd: pytest.CaptureFixture[str]
) -> None:
    venv.set(config=f"global.timeout='60'\n{section}.{setting}='https://user:secret@mirror.invalid/simple'\n")
    assert run(venv) == 0
    assert venv.installs() == [EVERYTHING]
    said = capfd.readouterr().out
    assert f"from where pip is configured to look ({setting})" in said and "secret" not in said


def test_settings_that_name_no_source_or_are_of_other_commands_count_for_nothing() -> None:
    lines = ["global.timeout='60'", "download.index-url='https://a'", "global.constraint='x=index-url'", "", "warning"]
    assert configured_sources(lines) == []
    assert configured_sources([*lines, "global.find-links='/wheels'", ":env:.find-links='/more'"]) == ["find-links"]


@pytest.mark.parametrize(
    ("wanted", "installed", "system", "nvidia", "sources", "from_cpu_index"),
    [
        ("auto", "", "Linux", "", [], True),
        ("auto", "", "Linux", "/dev/nvidia0", [], False),
        ("auto", "", "Darwin", "", [], False),
        ("auto", "", "Linux", "", ["index-url"], False),
        ("auto", "2.13.0", "Linux", "", [], False),
        ("cpu", "", "Linux", "/dev/nvidia0", ["index-url"], True),
        ("cpu", "2.13.0", "Linux", "", [], False),
        ("default", "", "Linux", "", [], False),
    ],
)
def test_the_build_of_torch_is_chosen_by_the_machine_unless_it_is_asked_for(
    wanted: str, installed: str, system: str, nvidia: str, sources: list[str], from_cpu_index: bool
) -> None:
    choice = torch_choice(wanted, installed, system, nvidia, sources)
    assert isinstance(choice, TorchChoice) and choice.from_cpu_index is from_cpu_index
    assert choice.reason
    if nvidia and wanted == "auto":
        assert nvidia in choice.reason and "2.7 GB" in choice.reason


def test_what_is_installed_already_is_not_fetched_again(venv: FakeVenv) -> None:
    venv.set(installed="2.13.0+cpu")
    assert run(venv) == 0 and venv.installs() == [EVERYTHING]


def test_a_failure_of_pip_is_the_exit_code(venv: FakeVenv) -> None:
    venv.set(pip_fails="2")
    assert run(venv, "--torch", "default", "--extras", "dev,compiler") == 2
    assert venv.installs() == [[*EVERYTHING[:-1], f"{ROOT}[dev,compiler]"]]


def test_what_is_installed_is_compiled_once_on_all_cores(venv: FakeVenv) -> None:
    assert run(venv) == 0
    assert venv.compilations() == [["-qq", "-j", "0", "-x", install.LEFT_UNCOMPILED, str(venv.path / "lib")]]


def test_nothing_is_compiled_after_a_failure_of_pip(venv: FakeVenv) -> None:
    venv.set(pip_fails="2")
    assert run(venv) == 2 and venv.compilations() == []


@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("torch/nn/functional.py", False),
        ("transformers/modeling_utils.py", False),
        ("transformers/models/llama/modeling_llama.py", True),
        ("sympy/core/tests/test_expr.py", True),
        ("torch/testing/_comparison.py", False),
    ],
)
def test_what_a_node_hardly_imports_is_left_uncompiled_wherever_the_checkout_is(file: str, left: bool) -> None:
    installed = f"/srv/tests/transformers/models/.venv/lib/python3.11/site-packages/{file}"
    assert bool(re.search(install.LEFT_UNCOMPILED, installed)) is left


def test_an_environment_without_pip_is_told_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert install.main(["--venv", str(tmp_path / "new"), "--cpu-index", INDEX]) == 1
    assert "apt-get install python3-venv" in capfd.readouterr().out


def test_an_older_python_is_named_with_what_to_do(
    venv: FakeVenv, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "OLDEST_PYTHON", (99, 0))
    assert run(venv) == 1
    assert "make PYTHON=" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, ""),
        ({"dev/nvidia0": ""}, "/dev/nvidia0"),
        ({"proc/driver/nvidia/version": "570"}, "/proc/driver/nvidia/version"),
        ({"usr/lib/wsl/lib/nvidia-smi": ""}, "/usr/lib/wsl/lib/nvidia-smi"),
        ({"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n", "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n"}, "PCI"),
        ({"sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n", "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n"}, ""),
        ({"sys/bus/pci/devices/0000:02:00.0/vendor": "0x1002\n", "sys/bus/pci/devices/0000:02:00.0/class": "0x030000\n"}, ""),
        ({"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n"}, ""),
    ],
)
def test_an_nvidia_device_is_seen_with_or_without_its_driver(files: dict[str, str], found: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert nvidia_device(tmp_path).startswith(found) and bool(nvidia_device(tmp_path)) is bool(found)


def test_it_runs_on_a_python_that_has_no_package(tmp_path: Path) -> None:
    venv = FakeVenv(tmp_path)
    venv.set(config="global.no-index='1'")
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "install.py"), "--venv", str(tmp_path), "--cpu-index", INDEX]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert venv.installs() == [EVERYTHING] and "(no-index)" in done.stdout


def test_make_hands_on_what_it_was_told(tmp_path: Path) -> None:
    told = [
        "MESH_TORCH=cpu",
        f"TORCH_CPU_INDEX={INDEX}",
        "MESH_EXTRAS=dev,compiler",
        f"VENV={tmp_path}/venv",
        "PYTHON=python3.99",
    ]
    done = subprocess.run(["make", "-n", "install", *told], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = f"python3.99 tools/install.py --venv {tmp_path}/venv --torch 'cpu' --cpu-index '{INDEX}' --extras 'dev,compiler'"
    assert expected in done.stdout


def test_the_pinned_torch_is_exact() -> None:
    assert pinned_torch(ROOT / "constraints.txt") == "torch==2.13.0"
