"""The package trial tells what a wheel lacks and what does not belong into it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.package_trial import PACKAGES, TrialFailed, run, wrong_content

TRACKED = ["mesh/__init__.py", "mesh/py.typed", "node/engine/native/rows.c", "tests/conftest.py", "tools/install.py", "README.md"]
METADATA = ["gossip_mesh-0.1.0.dist-info/METADATA", "gossip_mesh-0.1.0.dist-info/licenses/LICENSE"]


def test_a_wheel_of_the_tracked_files_of_the_packages_is_right() -> None:
    assert wrong_content([*TRACKED[:3], *METADATA], TRACKED) == []


def test_a_missing_source_and_a_test_in_the_wheel_are_told() -> None:
    assert wrong_content(["mesh/__init__.py", "mesh/py.typed", "tests/conftest.py", *METADATA], TRACKED) == [
        "node/engine/native/rows.c is not in the wheel",
        "tests/conftest.py is in the wheel, and should not be",
    ]


def test_each_package_says_that_it_is_typed() -> None:
    root = Path(__file__).parents[2]
    assert [name for name in PACKAGES if not (root / name / "py.typed").is_file()] == []


def test_a_command_that_fails_is_told_with_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match="exit code 3:\nno such build"):
        run([sys.executable, "-c", "print('no such build'); raise SystemExit(3)"], tmp_path)
