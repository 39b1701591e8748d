"""A node's identity: an Ed25519 key. Its id is derived from the public half, so no other node can take the id.

A node signs its claims about itself (address, departure, facts) once for each change; a peer that forwards a claim forwards the
signature too. So a peer, though it holds the mesh key, cannot make claims in another node's name. Claims of other nodes about a
member (suspect, dead) are not signed; the member's own next claim overrides them.
An id is eight bytes of a hash: the cost of finding a second key with this id is in `docs/decisions/0011-identity-is-a-key.md`.
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
_PERSON = b"mesh node id"  # so that a hash of another use is never an id


def node_of(public_key: bytes) -> NodeId:
    """Returns the id of a public key."""
    return NodeId(hashlib.blake2b(public_key, digest_size=_ID_BYTES, person=_PERSON).hexdigest())


class SignatureVerifier(Protocol):
    """Verifies the claims of other nodes. The simulator has a cheap verifier, for ten thousand nodes in one process."""

    def is_key_of(self, public_key: bytes, node: NodeId) -> bool:
        """Returns whether `node` is the id of this key."""

    def holds(self, public_key: bytes, statement: bytes, signature: bytes) -> bool:
        """Returns whether the owner of `public_key` signed `statement`; False for malformed input."""


class Signer(Protocol):
    """Signs the claims of one node about itself."""

    @property
    def public_key(self) -> bytes: ...

    @property
    def verifier(self) -> SignatureVerifier: ...

    def sign(self, statement: bytes) -> bytes:
        """Returns the signature; equal statements give equal bytes."""


class Ed25519Verifier:
    """Verifies Ed25519 signatures (RFC 8032)."""

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
    """The key of this node; `seed` is stored in its data directory only."""

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
