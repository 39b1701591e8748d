"""Files that people write or copy are read with or without a byte order mark, whatever ends their lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.load.plan import file_prompts
from mesh.errors import BadRequest
from mesh.files import replace_file, text_of
from mesh.keys.keyring import load_keyring
from mesh.keys.mesh_key import BadKeyFile, encode_key
from node.config import NodeConfig
from node.http.auth import new_api_key
from node.main import _load_api_keys

SHAPES = [(encoding, newline) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32") for newline in ("\n", "\r\n")]
KEY = bytes(range(32))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff")))
def test_a_text_is_decoded_in_every_encoding_with_a_mark(text: str) -> None:
    marked = [text.encode(encoding) for encoding in ("utf-8", "utf-8-sig", "utf-32")]
    if not text.startswith("\0"):  # after the mark of UTF-16 that reads as the mark of UTF-32
        marked.append(text.encode("utf-16"))
    assert {text_of(raw) for raw in marked} == {text}


def test_other_bytes_are_no_text() -> None:
    for raw in (b"\xff\xfe\xff", b"\x80", "ü".encode("latin-1")):
        with pytest.raises(UnicodeDecodeError):
            text_of(raw)


@pytest.mark.parametrize(("encoding", "newline"), SHAPES)
def test_a_mesh_key_is_read_in_any_of_them(tmp_path: Path, encoding: str, newline: str) -> None:
    file = tmp_path / "mesh.key"
    file.write_bytes(f"{encode_key(KEY)} 1{newline}{encode_key(KEY[::-1])} 0{newline}".encode(encoding))
    file.chmod(0o600)
    assert [key.secret for key in load_keyring(file).keys] == [KEY, KEY[::-1]]


@pytest.mark.parametrize("raw", [b"\xff\xfe\xff", b"\xef\xbb\xbf", "ü".encode(), b"\x00" * 32])
def test_an_invalid_mesh_key_is_reported_without_its_content(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "mesh.key"
    file.write_bytes(raw)
    file.chmod(0o600)
    with pytest.raises(BadKeyFile, match=r"mesh\.key .*make one with: mesh key new"):
        load_keyring(file)


@pytest.mark.parametrize(("encoding", "newline"), SHAPES)
def test_api_keys_are_read_in_any_of_them(tmp_path: Path, encoding: str, newline: str) -> None:
    key, line = new_api_key("laptop")
    file = tmp_path / "api.keys"
    file.write_bytes(f"{line}{newline}# a comment{newline}".encode(encoding))
    keys = _load_api_keys(NodeConfig(api_key_file=file))
    assert keys is not None and keys.tenant(f"Bearer {key}")


def test_api_keys_that_are_no_text_are_reported_as_such(tmp_path: Path) -> None:
    file = tmp_path / "api.keys"
    file.write_bytes(b"\xff\x00\xfe")
    with pytest.raises(BadRequest, match="no text file"):
        _load_api_keys(NodeConfig(api_key_file=file))


@pytest.mark.parametrize(("encoding", "newline"), SHAPES)
def test_a_file_of_prompts_is_read_in_any_of_them(tmp_path: Path, encoding: str, newline: str) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(f'{{"prompt": "first"}}{newline}second{newline}'.encode(encoding))
    prompts = file_prompts(file)
    assert [next(prompts)[0]["content"] for _ in range(2)] == ["first", "second"]


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    replace_file(path, b"new", durable=True)
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600
    replace_file(path, b"newer", mode=0o644)
    assert path.read_bytes() == b"newer" and path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(step, full)
        with pytest.raises(OSError, match="No space"):
            replace_file(path, b"new", durable=True)
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["state.json"]
