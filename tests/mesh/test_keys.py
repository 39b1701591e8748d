"""The mesh key's file and its subkeys."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mesh.keys.keyring import load_keyring
from mesh.keys.mesh_key import BadKeyFile, derive, encode_key, new_key, save_key


def load_key(path: Path) -> bytes:
    (key,) = load_keyring(path).secrets
    return key


def test_a_saved_key_is_read_back_and_is_its_owners_alone(tmp_path: Path) -> None:
    key = new_key()
    save_key(tmp_path / "key", key)
    assert load_key(tmp_path / "key") == key
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    save_key(tmp_path / "key", old := new_key())
    with pytest.raises(FileExistsError):
        save_key(tmp_path / "key", new_key())
    assert load_key(tmp_path / "key") == old


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds 0 bytes"),
        ("not base64!", "not base64"),
        (encode_key(bytes(16)), "holds 16 bytes"),
        ("x" * 9999, "holds 3072 bytes"),
    ],
)
def test_a_bad_key_file_is_refused_without_showing_its_content(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(BadKeyFile, match=complaint) as refused:
        load_key(path)
    assert str(path) in str(refused.value)
    assert not content or content not in str(refused.value)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    save_key(tmp_path / "key", new_key())
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(BadKeyFile, match="chmod 600"):
        load_key(tmp_path / "key")


def test_the_error_of_a_missing_key_file_has_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BadKeyFile, match="mesh key new"):
        load_key(tmp_path / "absent")


def test_subkeys_differ_by_label_and_by_key_and_are_the_same_everywhere() -> None:
    key = bytes(range(32))
    assert derive(key, "one") == derive(key, "one")
    assert len({derive(key, "one"), derive(key, "two"), derive(bytes(32), "one")}) == 3
    # Computed once and kept: a change of the derivation would cut a running mesh in two.
    assert derive(key, "gossip seal").hex() == "170fbac40c628b0ae72a63398f329416eab95d745662cc9d72e3e7c89f44bd83"
    with pytest.raises(ValueError, match="32 bytes"):
        derive(b"short", "one")
