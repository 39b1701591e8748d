"""A node's identity is an Ed25519 key. Its id is derived from the public half, so no other node can take the id.

A node signs its claims about itself (address, departure, facts), once for each change; a node that passes one on
passes the signature on. So a peer, though it holds the mesh key, cannot speak for another node. What others say of a node, that
it is silent or gone, is by nature not its own word: it is not signed, and the node's next word beats it.
Eight bytes of a hash are an id: the price of finding a second key for one is in `docs/decisions/0011-identity-is-a-key.md`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mesh.ids import NodeId

KEY_BYTES = 32  # of a public key, and of the private seed
SIGNATURE_BYTES = 64
_ID_BYTES = 8
_PERSON = b"mesh node id"  # so that no hash made for another use is an id


def node_of(public_key: bytes) -> NodeId:
    """The id that goes with a public key."""
    return NodeId(hashlib.blake2b(public_key, digest_size=_ID_BYTES, person=_PERSON).hexdigest())


class SignatureVerifier(Protocol):
    """Judges the words of others. The simulator has a cheap one, for ten thousand nodes in one process."""

    def is_key_of(self, public_key: bytes, node: NodeId) -> bool:
        """Whether this key, and no other, may speak for `node`."""

    def holds(self, public_key: bytes, statement: bytes, signature: bytes) -> bool:
        """Whether the owner of `public_key` signed `statement`. False for anything malformed."""


class Signer(Protocol):
    """One node's own voice."""

    @property
    def public_key(self) -> bytes: ...

    @property
    def verifier(self) -> SignatureVerifier: ...

    def sign(self, statement: bytes) -> bytes:
        """The same bytes for the same statement, always."""


class Ed25519Verifier:
    def is_key_of(self, public_key: bytes, node: NodeId) -> bool:
        return len(public_key) == KEY_BYTES and node_of(public_key) == node

    def holds(self, public_key: bytes, statement: bytes, signature: bytes) -> bool:
        if len(public_key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, statement)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True)
class IdentityKey:
    """The key of this node; `seed` never leaves its data directory."""

    seed: bytes = field(repr=False)
    private: Ed25519PrivateKey = field(init=False, repr=False)
    public_key: bytes = field(init=False)
    verifier: SignatureVerifier = field(init=False, default=Ed25519Verifier(), repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError when the seed is not 32 bytes."""
        private = Ed25519PrivateKey.from_private_bytes(self.seed)
        object.__setattr__(self, "private", private)
        object.__setattr__(self, "public_key", private.public_key().public_bytes_raw())

    @property
    def node(self) -> NodeId:
        return node_of(self.public_key)

    def sign(self, statement: bytes) -> bytes:
        return self.private.sign(statement)
