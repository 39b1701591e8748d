"""Files that a record vouches for are read once more, slowly; what differs is found, whatever the files look like."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from node.weights import verifying
from node.weights.catalogue import IdentifiedWeights, identify
from node.weights.hashing import HashingProgress
from node.weights.record import FileChange, changed_file
from node.weights.verifying import LOOK_EVERY_S, READ_EVERY_S, FilesChanged, FileVerifier
from tests.weights.models import write_model

WIDTH = 320


@pytest.fixture(autouse=True)
def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual clock does not wait for threads."""

    async def at_once(work: Callable[..., object], *args: object, limiter: object) -> object:
        await trio.lowlevel.checkpoint()
        return work(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", files=2, width=WIDTH)


def found(directory: Path) -> IdentifiedWeights:
    return identify(directory, None, HashingProgress())


def looks(directory: Path, files: IdentifiedWeights) -> FileChange | None:
    return changed_file(directory, files.files)


def flip(path: Path, at: int) -> None:
    """Another byte, and the file looks as before."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def changed(verifier: FileVerifier, directory: Path, files: IdentifiedWeights, *, verified: bool = False) -> FilesChanged:
    with trio.fail_after(10_000):
        return await verifier.changed(files.catalogue, lambda: looks(directory, files), verified=verified)


@pytest.mark.parametrize(("name", "at"), [("model-0.safetensors", -1), ("model-1.safetensors", 600_000), ("tokenizer.json", 3)])
async def test_a_byte_that_flipped_while_the_file_looks_the_same_is_found(
    directory: Path, autojump_clock: MockClock, name: str, at: int
) -> None:
    files = found(directory)
    flip(directory / name, at % (directory / name).stat().st_size)
    assert looks(directory, files) is None, "its size, time and inode say nothing"
    verifier = FileVerifier(lambda: False)
    change = await changed(verifier, directory, files)
    assert change.file == name and "other bytes than were hashed" in change.why and change.in_place
    assert verifier.statistics().wrong_pieces_total == 1


async def test_files_that_are_right_are_read_once_at_a_pace_and_then_only_looked_at(
    directory: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = found(directory)
    every_byte = sum(piece.size_bytes for _, piece in files.catalogue.pieces())
    monkeypatch.setattr(verifying, "IDLE_BYTES_S", every_byte / 1000)
    verifier = FileVerifier(lambda: False)
    began = trio.current_time()
    with trio.move_on_after(900):
        await changed(verifier, directory, files)
    assert 0.5 * every_byte < verifier.statistics().bytes_verified_total < every_byte, "slowly"
    with trio.move_on_after(900):
        await changed(verifier, directory, files, verified=True)
    assert verifier.statistics().bytes_verified_total < every_byte, "what was just hashed is not read again"
    assert trio.current_time() - began >= 1800


async def test_while_sequences_run_it_reads_more_slowly(
    directory: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = found(directory)
    every_byte = sum(piece.size_bytes for _, piece in files.catalogue.pieces())
    monkeypatch.setattr(verifying, "SERVING_BYTES_S", every_byte / 1000)
    read = []
    for serving in (True, False):
        verifier = FileVerifier(partial(bool, serving))
        with trio.move_on_after(100):
            await changed(verifier, directory, files)
        read.append(verifier.statistics().bytes_verified_total)
    assert read[0] < every_byte / 4 and read[1] == every_byte


@pytest.mark.parametrize("verified", [True, False])
async def test_a_file_that_is_written_is_seen_within_seconds(directory: Path, autojump_clock: MockClock, verified: bool) -> None:
    files = found(directory)
    verifier = FileVerifier(lambda: True)
    seen: list[tuple[FilesChanged, float]] = []

    async def watch() -> None:
        seen.append((await changed(verifier, directory, files, verified=verified), trio.current_time()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.sleep(60)
        written_at = trio.current_time()
        (directory / "config.json").write_text("{}")
    (change, at) = seen[0]
    assert change == FilesChanged("config.json", "config.json was written since it was hashed", in_place=True)
    assert at - written_at <= LOOK_EVERY_S + 1
    assert verifier.statistics().changed_files_total == 1


async def test_a_file_that_cannot_be_read_any_more_is_told(directory: Path, autojump_clock: MockClock) -> None:
    files = found(directory)
    os.truncate(directory / "model-1.safetensors", 1000)
    verifier = FileVerifier(lambda: False)
    with trio.fail_after(10_000):
        change = await verifier.changed(files.catalogue, lambda: None, verified=False)
    assert change.file == "model-1.safetensors" and "shorter than it was" in change.why and not change.in_place


@pytest.mark.parametrize("how", ["replaced", "removed"])
async def test_a_file_that_is_replaced_or_removed_leaves_what_was_loaded_as_it_was(
    directory: Path, autojump_clock: MockClock, how: str
) -> None:
    files = found(directory)
    path = directory / "model-1.safetensors"
    if how == "replaced":
        (directory / "new").write_bytes(path.read_bytes()[::-1])
        (directory / "new").replace(path)
    else:
        path.unlink()
    change = await changed(FileVerifier(lambda: False), directory, files)
    assert change == FilesChanged(path.name, f"{path.name} was replaced or removed since it was hashed", in_place=False)
    with (directory / "model-0.safetensors").open("r+b") as file:
        file.write(b"x")
    change = await changed(FileVerifier(lambda: False), directory, files)
    assert (change.file, change.in_place) == ("model-0.safetensors", True), "the graver one is told"


@pytest.mark.parametrize("verified", [True, False])
async def test_every_byte_is_read_again_once_a_day(directory: Path, autojump_clock: MockClock, verified: bool) -> None:
    files = found(directory)
    verifier = FileVerifier(lambda: False)
    every_byte = sum(piece.size_bytes for _, piece in files.catalogue.pieces())
    with trio.move_on_after(2.5 * READ_EVERY_S):
        await verifier.changed(files.catalogue, lambda: looks(directory, files), verified=verified)
    assert verifier.statistics().bytes_verified_total == every_byte * (2 if verified else 3)
    flip(directory / "model-0.safetensors", 500_000)
    with trio.fail_after(1.5 * READ_EVERY_S):
        change = await verifier.changed(files.catalogue, lambda: looks(directory, files), verified=True)
    assert change.file == "model-0.safetensors"
