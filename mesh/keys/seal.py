"""Seals datagrams: only holders of the mesh key can read or make them, changes are detected, and replays are refused.

Layout: head 1 (mark, version, kind), cluster 2, then for a sealed one: key 2, time 2, nonce 12, AES-GCM of the body, tag 16;
for a plain one: checksum 16, body. Associated data are all bytes before the nonce, the whole cluster label, and the whole
time, of which only the low bits are sent: the receiver completes it with its own clock, so the tag of a datagram that is older
by a full period of those bits does not match. The ids of cluster and key only serve to report the fault; the tag authenticates.
A plain seal detects damage and foreign datagrams on loopback, where a mesh without a key runs; it stops no attacker.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.keys.mesh_key import derive

_VERSION = 2
_PLAIN, _SEALED = 0, 1
_MARK, _MARK_MASK = 0b1010_0000, 0b1110_0000  # no UTF-8 text begins so; the lower bits are 4 of version and 1 of kind
_HEAD = struct.Struct("!B2s")
_KEY_ID_BYTES = 2
_TIME_BYTES = 2
_TIME_UNIT_S = 4  # two bytes then last 73 hours: a clock wrong by a time zone still differs from a forgery
_TIME_PERIOD = 256**_TIME_BYTES
_NONCE_BYTES = 12
_TAG_BYTES = 16
_CHECKSUM_BYTES = 16
REPLAY_WINDOW_S = 300.0  # before or after the own clock: clocks differ, and the harm of a replayed claim ends soon
NONCES_REMEMBERED = 16_384  # of the last datagrams opened: a replay of these is refused within the window too


class SealFault(StrEnum):
    """Why a datagram was not opened; each fault has a counter."""

    FOREIGN = "foreign"  # not a datagram of a mesh
    OTHER_VERSION = "other version"
    WRONG_CLUSTER = "wrong cluster"
    WRONG_KEY = "wrong key"
    DAMAGED = "damaged"
    REPLAYED = "replayed or too old"


class SealBroken(ValueError):
    """The datagram was not opened. The receiver drops it and counts it by `fault`."""

    def __init__(self, fault: SealFault) -> None:
        super().__init__(fault.value)
        self.fault = fault


class Seal(Protocol):
    """Makes the bodies of messages into datagrams, and opens them."""

    overhead_bytes: int

    def seal(self, body: bytes) -> bytes:
        """Returns the datagram with `body`; it is longer by `overhead_bytes`."""

    def open(self, datagram: bytes) -> bytes:
        """Returns the body. Raises SealBroken for a datagram that was not recently sealed by a node of this mesh."""


class KeySeal:
    """AES-256-GCM under the mesh key. With several keys the first seals and all open, so that keys can be rotated."""

    overhead_bytes = _HEAD.size + _KEY_ID_BYTES + _TIME_BYTES + _NONCE_BYTES + _TAG_BYTES

    def __init__(self, keys: Sequence[bytes], cluster: str = "mesh", clock: Callable[[], float] = time.time) -> None:
        self.install(keys)
        self._head = _HEAD.pack(_MARK | _VERSION << 1 | _SEALED, _cluster_id(cluster))
        self._cluster = cluster.encode()
        self._clock = clock
        self._seen: set[bytes] = set()
        self._seen_order: deque[bytes] = deque()

    def install(self, keys: Sequence[bytes]) -> None:
        """Replaces the keys. Datagrams opened before are still refused as replays."""
        if not keys:
            raise ValueError("a seal needs a key; without one use PlainSeal, on loopback only")
        ciphers: dict[bytes, list[AESGCM]] = {}  # two keys may share so short an id
        for key in dict.fromkeys(keys):
            ciphers.setdefault(_key_id(key), []).append(AESGCM(derive(key, "gossip seal")))
        self._ciphers, self._first = ciphers, _key_id(keys[0])

    def seal(self, body: bytes) -> bytes:
        at = int(self._clock() // _TIME_UNIT_S)
        prefix = self._head + self._first + (at % _TIME_PERIOD).to_bytes(_TIME_BYTES, "big")
        nonce = os.urandom(_NONCE_BYTES)
        encrypted: bytes = self._ciphers[self._first][0].encrypt(nonce, body, self._associated(prefix, at))
        return b"".join((prefix, nonce, encrypted))

    def open(self, datagram: bytes) -> bytes:
        _check_head(datagram, self._head)
        if len(datagram) < self.overhead_bytes:
            raise SealBroken(SealFault.FOREIGN)
        prefix_bytes = self.overhead_bytes - _NONCE_BYTES - _TAG_BYTES
        prefix, nonce = datagram[:prefix_bytes], datagram[prefix_bytes : prefix_bytes + _NONCE_BYTES]
        ciphers = self._ciphers.get(prefix[_HEAD.size : _HEAD.size + _KEY_ID_BYTES])
        if ciphers is None:
            raise SealBroken(SealFault.WRONG_KEY)
        now = int(self._clock() // _TIME_UNIT_S)
        age = (now - int.from_bytes(prefix[-_TIME_BYTES:], "big") + _TIME_PERIOD // 2) % _TIME_PERIOD - _TIME_PERIOD // 2
        body = _decrypted(ciphers, nonce, datagram[prefix_bytes + _NONCE_BYTES :], self._associated(prefix, now - age))
        if abs(age) * _TIME_UNIT_S > REPLAY_WINDOW_S or nonce in self._seen:
            raise SealBroken(SealFault.REPLAYED)
        self._remember(nonce)
        return body

    def _associated(self, prefix: bytes, at: int) -> bytes:
        return prefix + at.to_bytes(8, "big", signed=True) + self._cluster

    def _remember(self, nonce: bytes) -> None:
        if len(self._seen_order) >= NONCES_REMEMBERED:
            self._seen.discard(self._seen_order.popleft())
        self._seen_order.append(nonce)
        self._seen.add(nonce)


class PlainSeal:
    """A checksum over label and body, without a secret. For a mesh without a key, which runs on loopback only."""

    overhead_bytes = _HEAD.size + _CHECKSUM_BYTES

    def __init__(self, cluster: str = "mesh") -> None:
        self._head = _HEAD.pack(_MARK | _VERSION << 1 | _PLAIN, _cluster_id(cluster))
        self._cluster = cluster.encode()

    def seal(self, body: bytes) -> bytes:
        return self._head + self._checksum(body) + body

    def open(self, datagram: bytes) -> bytes:
        _check_head(datagram, self._head)
        if len(datagram) < self.overhead_bytes:
            raise SealBroken(SealFault.FOREIGN)
        body = datagram[self.overhead_bytes :]
        if datagram[_HEAD.size : self.overhead_bytes] != self._checksum(body):
            raise SealBroken(SealFault.DAMAGED)
        return body

    def _checksum(self, body: bytes) -> bytes:
        return hashlib.blake2b(self._cluster + b"\0" + body, digest_size=_CHECKSUM_BYTES).digest()


def _cluster_id(cluster: str) -> bytes:
    return hashlib.blake2b(cluster.encode(), digest_size=2).digest()


def _key_id(key: bytes) -> bytes:
    return derive(key, "gossip key id", _KEY_ID_BYTES)


def _decrypted(ciphers: Sequence[AESGCM], nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    """Decrypts with the key that sealed it; nearly always there is only one. Raises SealBroken when none did."""
    for cipher in ciphers:
        try:
            body: bytes = cipher.decrypt(nonce, sealed, associated)
            return body
        except InvalidTag:
            continue
    raise SealBroken(SealFault.DAMAGED)


def _check_head(datagram: bytes, expected: bytes) -> None:
    """Raises SealBroken when the datagram is of another protocol, version, kind of seal, or cluster."""
    if datagram[:2] == b"GM":  # the first bytes in version 1
        raise SealBroken(SealFault.OTHER_VERSION)
    if len(datagram) < _HEAD.size or datagram[0] & _MARK_MASK != _MARK:
        raise SealBroken(SealFault.FOREIGN)
    differs = datagram[0] ^ expected[0]
    if differs > 1:
        raise SealBroken(SealFault.OTHER_VERSION)
    if differs:
        raise SealBroken(SealFault.WRONG_KEY)  # one of the two nodes has a key and the other has none
    if datagram[1 : _HEAD.size] != expected[1:]:
        raise SealBroken(SealFault.WRONG_CLUSTER)
