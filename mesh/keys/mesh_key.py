"""The mesh key: one file that is copied to all nodes, from which every other key is derived.

32 random bytes as base64 on one line, readable by its owner alone; while keys are rotated, several lines (`mesh.keys.keyring`).
Subkeys are derived by HKDF-SHA256 (RFC 5869) with a label for each use, so that no two uses share a key.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mesh.files import text_of

KEY_BYTES = 32
_MAX_FILE_BYTES = 4096
_SALT = b"gossip-mesh key v1"


class BadKeyFile(ValueError):
    """A key file is missing, malformed or readable by others; the message has the reason and the remedy."""


def new_key() -> bytes:
    """Returns 32 bytes from the system's random generator."""
    return secrets.token_bytes(KEY_BYTES)


def encode_key(key: bytes) -> str:
    """Returns the line of a key file, without its newline."""
    return base64.b64encode(key).decode()


def save_key(path: Path, key: bytes) -> None:
    """Writes a new key file with mode 0600.

    Raises:
        FileExistsError: the file exists; a mesh key is never overwritten.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(encode_key(key) + "\n")


def read_key_file(path: Path) -> str:
    """Returns the text of a key file.

    Raises:
        BadKeyFile: it cannot be read, or others may read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise BadKeyFile(f"cannot read the mesh key {path}: {error.strerror}; make one with: mesh key new") from None
    if mode & 0o077:
        raise BadKeyFile(f"the mesh key {path} may be read by others (mode {mode:04o}); run: chmod 600 {path}")
    try:
        return text_of(text)
    except UnicodeDecodeError:
        raise BadKeyFile(f"the mesh key {path} is not base64; make one with: mesh key new") from None


def decode_key(text: str, path: Path) -> bytes:
    """Returns the 32 bytes that `encode_key` wrote.

    Raises:
        BadKeyFile: the text is not a key. The message names `path`, never the content.
    """
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadKeyFile(f"the mesh key {path} is not base64; make one with: mesh key new") from None
    if len(key) != KEY_BYTES:
        raise BadKeyFile(f"the mesh key {path} holds {len(key)} bytes, expected {KEY_BYTES}; make one with: mesh key new")
    return key


def derive(key: bytes, label: str, size_bytes: int = 32) -> bytes:
    """Returns the subkey for one use; it is the same on every node that has `key`.

    Raises:
        ValueError: `key` is not a whole mesh key.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a mesh key has {KEY_BYTES} bytes, got {len(key)}")
    return HKDF(algorithm=SHA256(), length=size_bytes, salt=_SALT, info=label.encode()).derive(key)
