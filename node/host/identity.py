"""The node's permanent identity: a key kept in its data directory, with a count of its starts.

The node's id is derived from the key, which signs its claims: a process that reads the file can act as the node. The epoch
grows with every start, so peers can tell a restarted process from a revived one. A lock keeps two processes from being the
same node at once.
"""

from __future__ import annotations

import fcntl
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import structlog

from mesh.errors import BadRequest
from mesh.files import replace_file
from mesh.ids import NodeId
from mesh.keys.signing import IdentityKey

log = structlog.get_logger()


class _Stored(msgspec.Struct):
    id: str
    epoch: int
    seed: bytes = b""  # of the key; none in files of a time when ids were drawn by lot


@dataclass(frozen=True, slots=True)
class Identity:
    key: IdentityKey
    epoch: int
    directory: Path
    lock: IO[bytes]  # held as long as the process lives

    @property
    def id(self) -> NodeId:
        return self.key.node

    def renew(self, epoch: int) -> None:
        """The mesh knew a higher epoch of this node than its own disk did: the next start must be higher still.

        A disk that cannot keep it is told of and no reason to end: the mesh will say it again.
        """
        try:
            _write(self.directory / "node.json", _Stored(self.id, epoch, self.key.seed))
        except BadRequest as error:
            log.error("identity.not_kept", epoch=epoch, reason=str(error))


def take_identity(directory: Path, *, new: bool = False) -> Identity:
    """Reads or makes the identity in `directory`, and counts this start. `new`: makes one in place of what is there.

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
        stored = None if new else _read(directory / "node.json")
        key = IdentityKey(stored.seed if stored and stored.seed else secrets.token_bytes(32))
        stored = _Stored(key.node, (stored.epoch if stored else 0) + 1, key.seed)
        _write(directory / "node.json", stored)
    except BadRequest:
        lock.close()
        raise
    return Identity(key, stored.epoch, directory, lock)


def take_free_identity(parent: Path, *, new: bool = False) -> Identity:
    """The first directory under `parent` that no running node uses: two nodes started alike on one machine just work."""
    for number in range(1, 1000):
        try:
            return take_identity(parent / f"node-{number}", new=new)
        except BadRequest as error:
            if "another running node" not in str(error):
                raise
    raise BadRequest(f"1,000 nodes run from {parent} already; give --data-dir", "data_dir")


def _read(path: Path) -> _Stored | None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, OSError) as error:
        raise BadRequest(f"{path} is damaged ({error}); remove it to start as a new node", "data_dir") from None
    drawn = not stored.seed and len(stored.id) == 16 and all(c in "0123456789abcdef" for c in stored.id)
    made = len(stored.seed) == 32 and IdentityKey(stored.seed).node == stored.id
    if not (drawn or made) or stored.epoch < 0:
        raise BadRequest(f"{path} holds no node id and its key; remove it to start as a new node", "data_dir")
    if stored.seed and mode & 0o077:
        raise BadRequest(f"{path} may be read by others (mode {mode:04o}), who could be this node; run: chmod 600", "data_dir")
    return stored


def _write(path: Path, stored: _Stored) -> None:
    """Replaces the file atomically, also when the power fails."""
    try:
        replace_file(path, msgspec.json.encode(stored), durable=True)
    except OSError as error:
        raise BadRequest(f"--data-dir: cannot write {path}: {error.strerror}", "data_dir") from None
