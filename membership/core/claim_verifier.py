"""Claim authentication: whether a claim in a node's name is signed by that node.

The first key received for a node stays its key for as long as the node is known: a second key with the same id cannot take
the place of a known member.
"""

from __future__ import annotations

import msgspec

from membership.core.members import Member, description_of, standing_of
from mesh.ids import NodeId
from mesh.keys.signing import Signer
from mesh.wire.gossip import Alive, Claim, Left
from mesh.wire.statements import alive_statement, left_statement


class ClaimVerifier:
    """Signs this node's claims and verifies those of others; `forged` counts signatures that did not hold."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self.key = signer.public_key
        self.forged = 0

    def signed(self, claim: Alive) -> Alive:
        """Returns this node's own claim, signed. Only the first claim of a run carries the public key."""
        signature = self._signer.sign(alive_statement(claim))
        return alive_of(claim, signature, self.key)

    def farewell(self, node: NodeId, epoch: int, incarnation: int) -> Left:
        """Returns this node's signed claim that it left."""
        bare = Left(node, epoch, incarnation)
        return Left(node, epoch, incarnation, self._signer.sign(left_statement(bare)))

    def verifies(self, own: Alive | Left, key: bytes) -> bool:
        """Returns whether the node that `own` is about signed it; counts forgeries. `key`: the stored or received one."""
        verifier = self._signer.verifier
        other_key = isinstance(own, Alive) and own.key not in (b"", key)
        statement = alive_statement(own) if isinstance(own, Alive) else left_statement(own)
        if not other_key and verifier.is_key_of(key, own.node) and verifier.holds(key, statement, own.signature):
            return True
        self.forged += 1
        return False


def alive_of(claim: Alive, signature: bytes, key: bytes) -> Alive:
    place = claim.name, claim.host, claim.port, claim.region
    return Alive(claim.node, claim.epoch, claim.incarnation, *place, signature, key if claim.incarnation == 0 else b"")


def is_news(own: Alive | Left, member: Member) -> bool:
    """Returns whether a node's own claim is newer than its record: only then is it worth a verification."""
    return standing_of(own) > member.standing if isinstance(own, Left) else description_of(own) > member.description


def limited_to_own(claim: Claim, member: Member, own: Alive | Left | None) -> Claim:
    """Limits an accusation to the counts of the accused's latest own claim; `own`: an authentic one received with it."""
    if isinstance(claim, Alive | Left):
        return claim
    own_counts = max((member.epoch, member.incarnation), (own.epoch, own.incarnation) if own is not None else (0, 0))
    if (claim.epoch, claim.incarnation) <= own_counts:
        return claim
    return msgspec.structs.replace(claim, epoch=own_counts[0], incarnation=own_counts[1])
