"""Who this node is, for life: kept in its data directory, with a count of its starts.

The epoch grows with every start, so peers can tell a restarted process from a revived one. A lock
keeps two processes from being the same node at once.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import structlog

from mesh.errors import BadRequest
from mesh.ids import NodeId

log = structlog.get_logger()


class _Stored(msgspec.Struct):
    id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Identity:
    id: NodeId
    epoch: int
    directory: Path
    lock: IO[bytes]  # held as long as the process lives

    def renew(self, epoch: int) -> None:
        """The mesh knew a higher epoch of this node than its own disk did: the next start must be higher still.

        A disk that cannot keep it is told of and no reason to end: the mesh will say it again.
        """
        try:
            _write(self.directory / "node.json", _Stored(self.id, epoch))
        except BadRequest as error:
            log.error("identity.not_kept", epoch=epoch, reason=str(error))


def take_identity(directory: Path) -> Identity:
    """Reads or makes the identity in `directory`, and counts this start.

    Raises:
        BadRequest: the directory cannot be written, is in use by a running node, or its identity is damaged.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / "lock", "ab")  # noqa: SIM115 - held for the life of the process
    except OSError as error:
        raise BadRequest(f"--data-dir {directory}: cannot be written: {error.strerror}", "data_dir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise BadRequest(f"--data-dir {directory}: another running node uses it; give each node its own", "data_dir") from None
    try:
        stored = _read(directory / "node.json")
        stored = _Stored(stored.id, stored.epoch + 1) if stored else _Stored(secrets.token_hex(8), 1)
        _write(directory / "node.json", stored)
    except BadRequest:
        lock.close()
        raise
    return Identity(NodeId(stored.id), stored.epoch, directory, lock)


def take_free_identity(parent: Path) -> Identity:
    """The first directory under `parent` that no running node uses: two nodes started alike on one machine just work."""
    for number in range(1, 1000):
        try:
            return take_identity(parent / f"node-{number}")
        except BadRequest as error:
            if "another running node" not in str(error):
                raise
    raise BadRequest(f"1,000 nodes run from {parent} already; give --data-dir", "data_dir")


def _read(path: Path) -> _Stored | None:
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, OSError) as error:
        raise BadRequest(f"{path} is damaged ({error}); remove it to start as a new node", "data_dir") from None
    if not (len(stored.id) == 16 and all(c in "0123456789abcdef" for c in stored.id) and stored.epoch >= 0):
        raise BadRequest(f"{path} holds no node id of 16 hex digits; remove it to start as a new node", "data_dir")
    return stored


def _write(path: Path, stored: _Stored) -> None:
    """Whole or not at all, also when the power fails."""
    aside = path.with_suffix(".new")
    try:
        with open(aside, "wb") as file:
            file.write(msgspec.json.encode(stored))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise BadRequest(f"--data-dir: cannot write {path}: {error.strerror}", "data_dir") from None
