"""A stand-in for Ed25519 where thousands of nodes share one process: a checksum in place of a signature.

It keeps what the protocol relies on, that claims changed on the way, or signed with another key, do not verify, at a
hundredth of the price. It stops no attacker, so no real node uses it.
"""

from __future__ import annotations

import zlib

from mesh.ids import NodeId


class StandInVerifier:
    def is_key_of(self, public_key: bytes, node: NodeId) -> bool:
        return public_key == node.encode()

    def holds(self, public_key: bytes, statement: bytes, signature: bytes) -> bool:
        return signature == _checksum(public_key, statement)


_VERIFIER = StandInVerifier()


class StandInSigner:
    verifier = _VERIFIER

    def __init__(self, node: NodeId) -> None:
        self.public_key = node.encode()

    def sign(self, statement: bytes) -> bytes:
        return _checksum(self.public_key, statement)


def _checksum(public_key: bytes, statement: bytes) -> bytes:
    return zlib.crc32(statement, zlib.crc32(public_key)).to_bytes(4, "big")
