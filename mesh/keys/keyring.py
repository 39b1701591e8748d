"""The mesh's secrets, one or several: the first seals, all open, so that a key can be changed while the mesh runs.

A key is known by its serial and a name made from it, never by its bytes; a later serial replaces an earlier one, and among
equal serials (two rotations begun at once) the higher name wins everywhere. So every step is one-way: what a ring has been told
may come late, twice, or from two rotations at once, and it never goes back to a key that peers may have dropped.
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

MAX_KEYS = 8  # of rotations begun and never ended; each is finished before the next begins, so two are usual
MAX_SERIAL = 2**32
_NAME_BYTES = 4
_NONCE_BYTES = 12


class RingError(ValueError):
    """This step is not for this ring; the text says why. The ring is unchanged."""


@total_ordering
@dataclass(frozen=True, slots=True)
class KeyTag:
    """What may be said of a key aloud."""

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
    """The sealing key first, then the others by their order."""

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
        """A new key, later than all here."""
        return RingKey(self.newest.serial + 1, new_key())

    def add(self, key: RingKey) -> Keyring:
        """With `key` to open by. One that this ring is past changes nothing.

        Raises:
            RingError: the ring is full.
        """
        if key.tag in self.tags or key.tag < self.sealing:
            return self
        return Keyring((self.keys[0], *sorted((*self.keys[1:], key), key=lambda key: key.tag)))

    def use(self, tag: KeyTag) -> Keyring:
        """Sealing with this key from now on; unless with a later one already.

        Raises:
            RingError: it was never added.
        """
        if tag <= self.sealing:
            return self
        key = self.get(tag)
        if key is None:
            raise RingError(f"key {tag.name} was never added here")
        return Keyring((key, *(other for other in self.keys if other.tag != tag)))

    def drop_before(self, tag: KeyTag) -> Keyring:
        """Without the keys that this one replaces.

        Raises:
            RingError: this ring still seals with one of them.
        """
        if self.sealing < tag:
            raise RingError(f"still sealing with key {self.sealing.name}, which {tag.name} replaces")
        return Keyring(tuple(key for key in self.keys if key.tag >= tag))


def wrap(key: RingKey, under: RingKey) -> bytes:
    """`key` sealed so that only a holder of `under` reads it."""
    nonce = os.urandom(_NONCE_BYTES)
    associated = key.serial.to_bytes(8, "big")
    return nonce + AESGCM(derive(under.secret, "key wrap")).encrypt(nonce, key.secret, associated)


def unwrap(serial: int, wrapped: bytes, under: RingKey) -> RingKey:
    """Raises RingError when it was not wrapped under this key, or for another serial."""
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
    """Raises BadKeyFile: it cannot be read, others may read it, or a line holds no key. Never names the content."""
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
