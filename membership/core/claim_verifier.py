"""Whether what is said in a node's name is its own word.

The key first heard for a node stays its key for as long as the node is remembered: one who finds a second key with the
same id still cannot take the place of a node that anybody knows.
"""

from __future__ import annotations

import msgspec

from membership.core.members import Member, description_of, standing_of
from mesh.ids import NodeId
from mesh.keys.signing import Signer
from mesh.wire.gossip import Alive, Claim, Left
from mesh.wire.statements import alive_statement, left_statement


class ClaimVerifier:
    """`forged`: how many claims were in another's name."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self.key = signer.public_key
        self.forged = 0

    def signed(self, claim: Alive) -> Alive:
        """This node's own claim, signed. The key goes with the first words of a run only."""
        signature = self._signer.sign(alive_statement(claim))
        return alive_of(claim, signature, self.key)

    def farewell(self, node: NodeId, epoch: int, incarnation: int) -> Left:
        bare = Left(node, epoch, incarnation)
        return Left(node, epoch, incarnation, self._signer.sign(left_statement(bare)))

    def hold(self, words: Alive | Left, key: bytes) -> bool:
        """Whether the owner said this. `key`: the one known for it, or the one that came along. Counts what does not hold."""
        verifier = self._signer.verifier
        other_key = isinstance(words, Alive) and words.key not in (b"", key)
        statement = alive_statement(words) if isinstance(words, Alive) else left_statement(words)
        if not other_key and verifier.is_key_of(key, words.node) and verifier.holds(key, statement, words.signature):
            return True
        self.forged += 1
        return False


def alive_of(claim: Alive, signature: bytes, key: bytes) -> Alive:
    place = claim.name, claim.host, claim.port, claim.region
    return Alive(claim.node, claim.epoch, claim.incarnation, *place, signature, key if claim.incarnation == 0 else b"")


def is_news(words: Alive | Left, member: Member) -> bool:
    """Whether they go beyond what is known of the node: only then are they worth a verification."""
    return standing_of(words) > member.standing if isinstance(words, Left) else description_of(words) > member.description


def within_words(claim: Claim, member: Member, words: Alive | Left | None) -> Claim:
    """An accusation, aimed no higher than at what the accused is known to have said; `words`: what came along, and holds."""
    if isinstance(claim, Alive | Left):
        return claim
    said = max((member.epoch, member.incarnation), (words.epoch, words.incarnation) if words is not None else (0, 0))
    if (claim.epoch, claim.incarnation) <= said:
        return claim
    return msgspec.structs.replace(claim, epoch=said[0], incarnation=said[1])
