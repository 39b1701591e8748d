"""Spill: bounded, private, and never returns anything but the content that was put."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import BadRequest
from node.engine.kv.spill import TAG_BYTES, Spill, SpilledContentLost

pytestmark = pytest.mark.no_kernel


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_least_recently_used_content_moves_to_disk_and_back(tmp_path: Path) -> None:
    spill = Spill(20, 1000, tmp_path / "spill")
    for name in (b"a", b"b"):
        assert spill.put(name, name * 10)
    assert spill.get(b"a") == b"a" * 10 and not files(tmp_path / "spill")
    assert spill.put(b"c", b"c" * 10), "b moves to a file"
    assert len(files(tmp_path / "spill")) == 1 and spill.statistics().disk_bytes == 10 + TAG_BYTES
    assert spill.get(b"b") == b"b" * 10, "and a moves to a file instead"
    now = spill.statistics()
    assert (now.memory_bytes, now.disk_bytes, now.read_total, now.read_from_disk_total) == (20, 10 + TAG_BYTES, 2, 1)
    assert [spill.get(name) for name in (b"a", b"b", b"c")] == [b"a" * 10, b"b" * 10, b"c" * 10]


def test_files_are_private_and_their_names_are_keyed_hashes(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        one, other = (Spill(0, 1000, tmp_path / folder) for folder in ("one", "other"))
        assert one.put(b"a", b"secret") and other.put(b"a", b"secret")
    finally:
        os.umask(mask)
    [file], [same] = files(tmp_path / "one"), files(tmp_path / "other")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert file.name != same.name and file.read_bytes()[-TAG_BYTES:] != same.read_bytes()[-TAG_BYTES:], "each store has a key"


def exchange_files(files: list[Path]) -> None:
    one, other = (file.read_bytes() for file in files)
    files[0].write_bytes(other)
    files[1].write_bytes(one)


def replace_by_link(files: list[Path]) -> None:
    kept = files[0].rename(files[0].with_suffix(".kept"))
    files[0].symlink_to(kept)


DAMAGES = {
    "a bit flipped": lambda files: files[0].write_bytes(bytes([files[0].read_bytes()[0] ^ 1]) + files[0].read_bytes()[1:]),
    "cut short": lambda files: files[0].write_bytes(files[0].read_bytes()[:-1]),
    "made longer": lambda files: files[0].write_bytes(files[0].read_bytes() + b"\0"),
    "gone": lambda files: files[0].unlink(),
    "two exchanged": exchange_files,
    "a link": replace_by_link,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_was_changed_is_refused_and_counted(kind: str, tmp_path: Path) -> None:
    spill = Spill(0, 1000, tmp_path / "spill")
    assert spill.put(b"a", b"x" * 40) and spill.put(b"b", b"y" * 40)
    DAMAGES[kind](files(tmp_path / "spill"))
    whole = []
    for name in (b"a", b"b"):
        try:
            whole.append(spill.get(name))
        except SpilledContentLost:
            with pytest.raises(SpilledContentLost, match="not here"):
                spill.get(name)
    assert set(whole) <= {b"x" * 40, b"y" * 40} and len(whole) == (0 if kind == "two exchanged" else 1)
    assert spill.statistics().damaged_total == 2 - len(whole)
    assert spill.statistics().disk_bytes == len(whole) * (40 + TAG_BYTES)


def test_files_are_removed_at_close_and_after_a_kill_at_start(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    killed = Spill(0, 1000, folder)
    assert killed.put(b"a", b"x") and len(files(folder)) == 1
    spill = Spill(0, 1000, folder)
    assert not files(folder)
    with pytest.raises(SpilledContentLost):
        spill.get(b"a")
    assert spill.put(b"a", b"y")
    spill.close()
    assert not folder.exists() and not spill.put(b"b", b"z") and spill.statistics().disk_bytes == 0


def test_without_a_writable_folder_contents_are_refused(tmp_path: Path) -> None:
    spill = Spill(0, 1000, tmp_path / "spill")
    (tmp_path / "spill").rmdir()
    assert not spill.put(b"a", b"x") and spill.statistics().refused_total == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="--spill-disk"):
        Spill(0, 1000, tmp_path / "file")
    assert (tmp_path / "file").exists()
    assert not Spill(0, 1000, None).put(b"a", b"x"), "without a folder there are no files"


ACTS = st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 9), st.integers(0, 40)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(ACTS, st.sampled_from([0, 30, 100]), st.sampled_from([0, 80, 300]))
def test_spill_stays_within_its_limits_and_returns_what_was_put(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int, int]], memory: int, disk: int
) -> None:
    folder = tmp_path_factory.mktemp("spill") / "spill"
    spill = Spill(memory, disk, folder)
    put: dict[bytes, bytes] = {}
    for act, number, size in acts:
        name = bytes([number])
        match act:
            case "put" if name not in put:
                content = os.urandom(size)
                if spill.put(name, content):
                    put[name] = content
            case "get" if name in put:
                try:
                    assert spill.get(name) == put[name]
                except SpilledContentLost:  # it moved to memory, and the content it displaced found no room
                    del put[name]
            case "drop":
                spill.drop(name)
                put.pop(name, None)
        now = spill.statistics()
        assert now.memory_bytes <= memory and now.disk_bytes <= disk
        assert now.disk_bytes == sum(file.stat().st_size for file in files(folder))
    assert spill.statistics().memory_bytes + spill.statistics().disk_bytes >= sum(map(len, put.values()))
    for name in put:
        spill.drop(name)
    assert not files(folder) and spill.statistics().memory_bytes == 0
    spill.close()
