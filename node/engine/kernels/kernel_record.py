"""Keeps timings of kernels on disk, so that a node that starts again, and the next node on this machine, need not measure.

One file for each key, and the key names all that a timing depends on. The directory and the file must be the user's own
and writable by no one else. A file that is not, cannot be read, or holds anything but the timings of exactly this key is
measured anew. Nodes that start together measure once: the others wait for the lock.
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
MAX_S = 600.0  # no product takes so long: a time beyond it was not measured
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

Key = Mapping[str, str]


def timings(directory: Path, key: Key, names: Sequence[str], measure: Callable[[], Timings]) -> tuple[Timings, bool]:
    """The timings of the named kernels under `key`, and whether they were remembered; else `measure` is called.

    Only steady timings are kept. Where nothing can be kept, that is logged, and all else goes on.
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
    """What the file says of `key`; None where it says nothing that can be trusted."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_FILE_BYTES or not _is_mine_alone(about):
                return None
            told = json.loads(file.read(MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or told.get("key") != dict(key):
        return None
    times_s = told.get("times_s")
    if not isinstance(times_s, dict) or set(times_s) != set(names) or not all(map(_are_times, times_s.values())):
        return None
    return Timings({name: tuple(times) for name, times in times_s.items()}, steady=True)


def write(path: Path, key: Key, measured: Timings) -> None:
    """Replaces the record atomically, readable by its owner only. Raises OSError: it cannot be written."""
    replace_file(path, json.dumps({"key": dict(key), "times_s": measured.times_s}, indent=1).encode())


def _text(key: Key) -> str:
    return json.dumps(sorted(key.items()))


def _are_times(times: object) -> bool:
    """Those of one kernel; empty for one that cannot compute here."""
    return (
        isinstance(times, list)
        and len(times) in (0, len(ROWS))
        and all(isinstance(each, float) and math.isfinite(each) and 0.0 < each < MAX_S for each in times)
    )


def _is_mine_alone(about: os.stat_result) -> bool:
    return about.st_uid == os.getuid() and not about.st_mode & OTHERS_MAY_WRITE


def _own(directory: Path) -> Path:
    """Raises OSError: it cannot be made, or others could put a file there."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_mine_alone(directory.stat()):
        raise PermissionError(f"others may write to {directory}; make it yours alone (chmod 700)")
    return directory


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
