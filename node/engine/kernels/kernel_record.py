"""Keeps timings of kernels on disk, so that later starts of nodes on this machine need not measure again.

There is one file for each key, and the key holds everything that a timing depends on. The directory and the file must
belong to this user and be writable by no other. Where the file does not, cannot be read, or holds anything but the timings
of this key, kernels are measured anew. Of nodes that start together, one measures while the others wait for the lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog

from mesh.files import replace_file
from node.engine.kernels.kernel_timing import ROWS, Timings

log = structlog.get_logger()

MAX_FILE_BYTES = 16 << 10
MAX_S = 600.0  # no product takes so long: a greater value is not a measurement
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

Key = Mapping[str, str]


def timings(directory: Path, key: Key, names: Sequence[str], measure: Callable[[], Timings]) -> tuple[Timings, bool]:
    """Returns the kept timings of the named kernels under `key` and True; otherwise those that `measure` returns and False.

    Only steady timings are kept. If they cannot be written, this is logged.
    """
    measured: Timings | None = None
    try:
        with _locked(_own(directory)):
            path = directory / f"{hashlib.blake2b(_text(key).encode(), digest_size=16).hexdigest()}.json"
            found = read(path, key, names)
            if found is not None:
                return found, True
            measured = measure()
            if measured.steady:
                write(path, key, measured)
    except OSError as error:
        log.info("timings of kernels are not kept", directory=str(directory), reason=str(error))
    return measure() if measured is None else measured, False


def read(path: Path, key: Key, names: Sequence[str]) -> Timings | None:
    """Reads the timings of `key`; None where the file is missing, unsafe, damaged or of another key."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_FILE_BYTES or not _is_mine_alone(about):
                return None
            record = json.loads(file.read(MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("key") != dict(key):
        return None
    times_s = record.get("times_s")
    if not isinstance(times_s, dict) or set(times_s) != set(names) or not all(map(_are_times, times_s.values())):
        return None
    return Timings({name: tuple(times) for name, times in times_s.items()}, steady=True)


def write(path: Path, key: Key, measured: Timings) -> None:
    """Replaces the record atomically, readable by its owner only. Raises OSError: it cannot be written."""
    replace_file(path, json.dumps({"key": dict(key), "times_s": measured.times_s}, indent=1).encode())


def _text(key: Key) -> str:
    return json.dumps(sorted(key.items()))


def _are_times(times: object) -> bool:
    """Returns whether these are valid times of one kernel; an empty list is valid: the kernel cannot compute here."""
    return (
        isinstance(times, list)
        and len(times) in (0, len(ROWS))
        and all(isinstance(each, float) and math.isfinite(each) and 0.0 < each < MAX_S for each in times)
    )


def _is_mine_alone(about: os.stat_result) -> bool:
    return about.st_uid == os.getuid() and not about.st_mode & OTHERS_MAY_WRITE


def _own(directory: Path) -> Path:
    """Makes the directory if needed. Raises OSError: it cannot be made, or other users may write to it."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_mine_alone(directory.stat()):
        raise PermissionError(f"others may write to {directory}; make it yours alone (chmod 700)")
    return directory


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
