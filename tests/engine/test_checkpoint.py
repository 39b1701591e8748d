"""Checkpoints that a broken download or disk left behind: refused by name before anything is loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh.errors import BadRequest
from node.engine.model.checkpoint import read_checkpoint


@pytest.fixture
def copy(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_of("llama"), tmp_path / "copy"))


def test_weights_whose_end_is_missing_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    read_checkpoint(copy)

    weights.write_bytes(whole[:-1])
    with pytest.raises(BadRequest, match=f"cut short: expected {len(whole)} bytes, it has {len(whole) - 1}"):
        read_checkpoint(copy)


@pytest.mark.parametrize("header", [b"[]", b"{ ", b'{"w": 1}', b'{"w": {}}', b'{"w": {"data_offsets": []}}', b"\xff\xff"])
def test_a_header_of_another_form_is_refused(copy: Path, header: bytes) -> None:
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BadRequest, match=r"header of model\.safetensors is damaged"):
        read_checkpoint(copy)


def test_a_generation_config_that_is_no_json_is_refused(copy: Path) -> None:
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(BadRequest, match="generation config"):
        read_checkpoint(copy)
