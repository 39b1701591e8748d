"""The envelope of a datagram: nobody without the mesh key reads, alters or makes one, and none is taken twice.

Layout: magic 2, version 1, kind 1, cluster 4, then for a sealed one: key 4, nonce 12, AES-GCM of (time 8, body),
tag 16; for a plain one: checksum 16, body. All before the nonce, and the whole cluster label, is associated
data. A plain seal keeps strangers' garbage out on loopback, where a mesh without a key lives; it keeps out nobody who tries.
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

from mesh.keys import derive

_MAGIC = b"GM"
_VERSION = 1
_PLAIN, _SEALED = 0, 1
_HEAD = struct.Struct("!2sBB4s")
_TIME = struct.Struct("!d")
_KEY_ID_BYTES = 4
_NONCE_BYTES = 12
_TAG_BYTES = 16
_CHECKSUM_BYTES = 16
REPLAY_WINDOW_S = 300.0  # either way: clocks of unlike machines differ, and what a replayed claim can do ages fast
NONCES_REMEMBERED = 16_384  # of the last datagrams opened: within the window, a replay of these is refused too


class SealFault(StrEnum):
    """Why a datagram was not opened; a counter each."""

    FOREIGN = "foreign"  # not ours at all, or of another version
    WRONG_CLUSTER = "wrong cluster"
    WRONG_KEY = "wrong key"
    DAMAGED = "damaged"
    REPLAYED = "replayed or too old"


class SealBroken(ValueError):
    """The datagram is not to be believed. Drop and count by `fault`."""

    def __init__(self, fault: SealFault) -> None:
        super().__init__(fault.value)
        self.fault = fault


class Seal(Protocol):
    overhead_bytes: int

    def seal(self, body: bytes) -> bytes:
        """The datagram that carries `body`: `overhead_bytes` longer."""

    def open(self, datagram: bytes) -> bytes:
        """The body. Raises SealBroken for anything that no fresh `seal` of this mesh made."""


class KeySeal:
    """AES-256-GCM under the mesh key. Several keys make a ring: the first seals, all open, so keys can be rotated."""

    overhead_bytes = _HEAD.size + _KEY_ID_BYTES + _NONCE_BYTES + _TIME.size + _TAG_BYTES

    def __init__(self, keys: Sequence[bytes], cluster: str = "mesh", clock: Callable[[], float] = time.time) -> None:
        if not keys:
            raise ValueError("a seal needs a key; without one use PlainSeal, on loopback only")
        self._ciphers = {derive(key, "gossip key id", _KEY_ID_BYTES): AESGCM(derive(key, "gossip seal")) for key in keys}
        self._first = next(iter(self._ciphers))
        self._head = _HEAD.pack(_MAGIC, _VERSION, _SEALED, _cluster_id(cluster))
        self._cluster = cluster.encode()
        self._clock = clock
        self._seen: set[bytes] = set()
        self._seen_order: deque[bytes] = deque()

    def seal(self, body: bytes) -> bytes:
        prefix = self._head + self._first
        nonce = os.urandom(_NONCE_BYTES)
        timed = _TIME.pack(self._clock()) + body
        return prefix + nonce + self._ciphers[self._first].encrypt(nonce, timed, prefix + self._cluster)

    def open(self, datagram: bytes) -> bytes:
        if len(datagram) < self.overhead_bytes:
            raise SealBroken(SealFault.FOREIGN)
        _check_head(datagram, self._head)
        prefix_bytes = _HEAD.size + _KEY_ID_BYTES
        prefix, nonce = datagram[:prefix_bytes], datagram[prefix_bytes : prefix_bytes + _NONCE_BYTES]
        cipher = self._ciphers.get(prefix[_HEAD.size :])
        if cipher is None:
            raise SealBroken(SealFault.WRONG_KEY)
        try:
            timed = cipher.decrypt(nonce, datagram[prefix_bytes + _NONCE_BYTES :], prefix + self._cluster)
        except InvalidTag:
            raise SealBroken(SealFault.DAMAGED) from None
        (sealed_at,) = _TIME.unpack_from(timed)
        # Written so that a time that is not a number is refused as well.
        if not abs(self._clock() - sealed_at) <= REPLAY_WINDOW_S or nonce in self._seen:
            raise SealBroken(SealFault.REPLAYED)
        self._remember(nonce)
        return timed[_TIME.size :]

    def _remember(self, nonce: bytes) -> None:
        if len(self._seen_order) >= NONCES_REMEMBERED:
            self._seen.discard(self._seen_order.popleft())
        self._seen_order.append(nonce)
        self._seen.add(nonce)


class PlainSeal:
    """No secret: a checksum over label and body. For a mesh without a key, which stays on loopback."""

    overhead_bytes = _HEAD.size + _CHECKSUM_BYTES

    def __init__(self, cluster: str = "mesh") -> None:
        self._head = _HEAD.pack(_MAGIC, _VERSION, _PLAIN, _cluster_id(cluster))
        self._cluster = cluster.encode()

    def seal(self, body: bytes) -> bytes:
        return self._head + self._checksum(body) + body

    def open(self, datagram: bytes) -> bytes:
        if len(datagram) < self.overhead_bytes:
            raise SealBroken(SealFault.FOREIGN)
        _check_head(datagram, self._head)
        body = datagram[self.overhead_bytes :]
        if datagram[_HEAD.size : self.overhead_bytes] != self._checksum(body):
            raise SealBroken(SealFault.DAMAGED)
        return body

    def _checksum(self, body: bytes) -> bytes:
        return hashlib.blake2b(self._cluster + b"\0" + body, digest_size=_CHECKSUM_BYTES).digest()


def _cluster_id(cluster: str) -> bytes:
    return hashlib.blake2b(cluster.encode(), digest_size=4).digest()


def _check_head(datagram: bytes, expected: bytes) -> None:
    """Raises SealBroken when the datagram is of another protocol, version, kind of seal, or cluster."""
    magic, version, kind, cluster = _HEAD.unpack_from(datagram)
    _, _, expected_kind, expected_cluster = _HEAD.unpack(expected)
    if magic != _MAGIC or version != _VERSION:
        raise SealBroken(SealFault.FOREIGN)
    if kind != expected_kind:
        raise SealBroken(SealFault.WRONG_KEY)  # one of us has a key and the other has none
    if cluster != expected_cluster:
        raise SealBroken(SealFault.WRONG_CLUSTER)
