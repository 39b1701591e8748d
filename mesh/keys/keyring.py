"""The mesh's key ring: the first key seals, all keys open, so that the key can be replaced while the mesh runs.

A key is identified by its serial and a name derived from it, never by its bytes. A later serial replaces an earlier one; among
equal serials (two rotations begun at once) the higher name wins on every node. So every step goes one way: steps of a rotation
may arrive late, twice or mixed with those of another rotation, and a ring never returns to a key that peers may have dropped.
File: a line for each key, base64 and then its serial (none means 0), the sealing key first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import total_ordering
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.files import replace_file
from mesh.keys.mesh_key import BadKeyFile, decode_key, derive, encode_key, new_key, read_key_file

MAX_KEYS = 8  # of unfinished rotations; two keys are usual, because a rotation ends before the next begins
MAX_SERIAL = 2**32
_NAME_BYTES = 4
_NONCE_BYTES = 12


class RingError(ValueError):
    """The step does not apply to this ring; the message has the reason. The ring is unchanged."""


@total_ordering
@dataclass(frozen=True, slots=True)
class KeyTag:
    """Identifies a key without its secret; may be logged and sent."""

    serial: int
    name: str

    def __lt__(self, other: KeyTag) -> bool:
        return (self.serial, self.name) < (other.serial, other.name)


@dataclass(frozen=True, slots=True)
class RingKey:
    serial: int
    secret: bytes = field(repr=False)

    @property
    def tag(self) -> KeyTag:
        return KeyTag(self.serial, derive(self.secret, "key name", _NAME_BYTES).hex())


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys of a node: the sealing key first, then the others in order."""

    keys: tuple[RingKey, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= MAX_KEYS:
            raise RingError(f"a ring holds 1 to {MAX_KEYS} keys, got {len(self.keys)}")

    @property
    def sealing(self) -> KeyTag:
        return self.keys[0].tag

    @property
    def tags(self) -> tuple[KeyTag, ...]:
        return tuple(key.tag for key in self.keys)

    @property
    def newest(self) -> RingKey:
        return max(self.keys, key=lambda key: key.tag)

    @property
    def secrets(self) -> tuple[bytes, ...]:
        return tuple(key.secret for key in self.keys)

    def get(self, tag: KeyTag) -> RingKey | None:
        return next((key for key in self.keys if key.tag == tag), None)

    def successor(self) -> RingKey:
        """Returns a new random key, with a serial above all of this ring."""
        return RingKey(self.newest.serial + 1, new_key())

    def add(self, key: RingKey) -> Keyring:
        """Returns the ring with `key` added for opening; unchanged where it has the key, or seals with a later one.

        Raises:
            RingError: the ring is full.
        """
        if key.tag in self.tags or key.tag < self.sealing:
            return self
        return Keyring((self.keys[0], *sorted((*self.keys[1:], key), key=lambda key: key.tag)))

    def use(self, tag: KeyTag) -> Keyring:
        """Returns the ring with this key as the sealing key; unchanged where it seals with a later one.

        Raises:
            RingError: the key is not on this ring.
        """
        if tag <= self.sealing:
            return self
        key = self.get(tag)
        if key is None:
            raise RingError(f"key {tag.name} was never added here")
        return Keyring((key, *(other for other in self.keys if other.tag != tag)))

    def drop_before(self, tag: KeyTag) -> Keyring:
        """Returns the ring without the keys that this key replaces.

        Raises:
            RingError: this ring still seals with one of them.
        """
        if self.sealing < tag:
            raise RingError(f"still sealing with key {self.sealing.name}, which {tag.name} replaces")
        return Keyring(tuple(key for key in self.keys if key.tag >= tag))


def wrap(key: RingKey, under: RingKey) -> bytes:
    """Returns `key`, encrypted under the key `under`."""
    nonce = os.urandom(_NONCE_BYTES)
    associated = key.serial.to_bytes(8, "big")
    return nonce + AESGCM(derive(under.secret, "key wrap")).encrypt(nonce, key.secret, associated)


def unwrap(serial: int, wrapped: bytes, under: RingKey) -> RingKey:
    """Decrypts a key that `wrap` encrypted.

    Raises:
        RingError: it was wrapped under another key or with another serial.
    """
    if not 0 <= serial <= MAX_SERIAL:
        raise RingError(f"a key's serial is at most {MAX_SERIAL}, got {serial}")
    nonce, sealed = wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:]
    try:
        secret = AESGCM(derive(under.secret, "key wrap")).decrypt(nonce, sealed, serial.to_bytes(8, "big"))
        derive(secret, "key name")
    except (InvalidTag, ValueError):
        raise RingError(f"what came is no key sealed under key {under.tag.name}") from None
    return RingKey(serial, secret)


def load_keyring(path: Path) -> Keyring:
    """Reads a ring from its file.

    Raises:
        BadKeyFile: it cannot be read, others may read it, or a line holds no key. The message never has the content.
    """
    lines = [line.split() for line in read_key_file(path).splitlines() if line.strip()] or [[""]]
    keys = []
    for parts in lines:
        secret = decode_key(parts[0], path)
        serial = parts[1] if len(parts) == 2 else "0"
        if len(parts) > 2 or not (serial.isascii() and serial.isdigit()) or int(serial) > MAX_SERIAL:
            raise BadKeyFile(f"the mesh key {path} holds a line that is not a key and its serial")
        keys.append(RingKey(int(serial), secret))
    try:
        return Keyring(tuple(dict.fromkeys(keys)))
    except RingError as error:
        raise BadKeyFile(f"the mesh key {path}: {error}") from None


def save_keyring(path: Path, ring: Keyring) -> None:
    """Replaces the key file atomically, readable by its owner only.

    Raises:
        OSError: the disk is full or may not be written.
    """
    text = "".join(f"{encode_key(key.secret)} {key.serial}\n" for key in ring.keys)
    replace_file(path, text.encode(), durable=True)
