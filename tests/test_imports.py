"""The one direction of imports, and cores without I/O: the import contract of pyproject.toml, run as a test."""

from pathlib import Path

import pytest
from importlinter.cli import lint_imports


def test_imports_go_one_way_and_cores_stay_pure(capsys: pytest.CaptureFixture[str]) -> None:
    configuration = Path(__file__).parent.parent / "pyproject.toml"
    assert lint_imports(config_filename=str(configuration), no_cache=True) == 0, capsys.readouterr().out
